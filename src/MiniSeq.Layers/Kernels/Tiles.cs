using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniSeq.Layers.Kernels;

/// <summary>Tiles of bfloat16 numbers in the orders that <see cref="MatrixKernel"/> reads. Strides count numbers.</summary>
internal static unsafe class Tiles
{
    private const int CacheLine = 32; // numbers

    /// <summary>[rows, columns] next to each other; rows up to <paramref name="padded"/> are zero.</summary>
    public static void Copy(ushort* source, long stride, int rows, int padded, int columns, ushort* target)
    {
        for (int r = 0; r < rows; r++) new Span<ushort>(source + (r * stride), columns).CopyTo(new Span<ushort>(target + ((long)r * columns), columns));
        new Span<ushort>(target + ((long)rows * columns), (padded - rows) * columns).Clear();
    }

    /// <summary>[rows, columns] as a right factor, [padded/2, columns, 2]; rows up to <paramref name="padded"/> (even) are zero.</summary>
    public static void PackRows(ushort* source, long stride, int rows, int padded, int columns, ushort* target)
    {
        var pairs = (uint*)target;
        for (int r = 0; r < padded; r += 2, pairs += columns)
        {
            ushort* first = source + (r * stride), second = first + stride;
            int c = 0;
            if (r + 1 < rows)
            {
                for (; c + 16 <= columns; c += 16) (Widened(first + c) | (Widened(second + c) << 16)).Store(pairs + c);
                for (; c < columns; c++) pairs[c] = first[c] | ((uint)second[c] << 16);
            }
            else
            {
                for (; c < columns; c++) pairs[c] = r < rows ? first[c] : 0u;
            }
        }
    }

    /// <summary>The transpose [columns, rows] of [rows, columns] as a right factor, [columns/2, padded, 2]; columns even. Numbers from rows to padded are left as they are.</summary>
    public static void PackColumns(ushort* source, long stride, int rows, int padded, int columns, ushort* target) =>
        Transpose((uint*)source, stride / 2, rows, columns / 2, (uint*)target, padded);

    /// <summary>The transpose [columns, padded] of [rows, columns]; what comes after the rows is zero, padded even. Scratch has padded · columns numbers.</summary>
    public static void TransposeRows(ushort* source, long stride, int rows, int padded, int columns, ushort* target, ushort* scratch)
    {
        PackRows(source, stride, rows, padded, columns, scratch);
        Transpose((uint*)scratch, columns, padded / 2, columns, (uint*)target, padded / 2);
    }

    /// <summary>Asks for [rows, columns] to be in the core's cache soon: pieces of long rows lie far apart in memory, and nothing else fetches them ahead.</summary>
    public static void Prefetch(ushort* source, long stride, int rows, int columns)
    {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c += CacheLine) Sse.Prefetch1(source + (r * stride) + c);
    }

    /// <summary>The transpose of [rows, columns] words of 32 bits, into rows of <paramref name="targetStride"/> words.</summary>
    public static void Transpose(uint* source, long stride, int rows, int columns, uint* target, long targetStride)
    {
        int wholeRows = rows / 16 * 16, wholeColumns = columns / 16 * 16;
        for (int r = 0; r < wholeRows; r += 16)
            for (int c = 0; c < wholeColumns; c += 16)
                Transpose16(source + (r * stride) + c, stride, target + (c * targetStride) + r, targetStride);
        for (int r = 0; r < rows; r++)
            for (int c = r < wholeRows ? wholeColumns : 0; c < columns; c++)
                target[(c * targetStride) + r] = source[(r * stride) + c];
    }

    // Exchanges one bit of the row's number with the same bit of the column's, four times.
    private static void Transpose16(uint* source, long stride, uint* target, long targetStride)
    {
        var rows = stackalloc Vector512<uint>[16];
        for (int r = 0; r < 16; r++) rows[r] = Vector512.Load(source + (r * stride));
        for (int bit = 1; bit < 16; bit <<= 1)
        {
            var lane = Vector512<uint>.Indices;
            var (one, other) = (Vector512.Create((uint)bit), Vector512.Create((uint)(bit | 16)));
            var isSet = Vector512.Equals(lane & one, one);
            var low = Vector512.ConditionalSelect(isSet, lane ^ other, lane);   // lanes with the bit come from the second row
            var high = Vector512.ConditionalSelect(isSet, lane | Vector512.Create(16u), lane | one);
            for (int r = 0; r < 16; r++)
            {
                if ((r & bit) != 0) continue;
                var (a, b) = (rows[r], rows[r + bit]);
                rows[r] = Avx512F.PermuteVar16x32x2(a, low, b);
                rows[r + bit] = Avx512F.PermuteVar16x32x2(a, high, b);
            }
        }
        for (int c = 0; c < 16; c++) rows[c].Store(target + (c * targetStride));
    }

    private static Vector512<uint> Widened(ushort* source) => Avx512F.ConvertToVector512UInt32(Vector256.Load(source));
}
