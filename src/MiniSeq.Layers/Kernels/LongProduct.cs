using System.Runtime.Intrinsics;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>The product of two bfloat16 matrices with far more terms than columns, as the gradient of what the LM head reads: the sums of a tile stay in their core's cache while all terms pass by.</summary>
internal static unsafe class LongProduct
{
    private const int TileRows = 256, TileColumns = 256, Depth = 256; // sums, and a block of terms with the next one on its way, in half a megabyte each
    private const int FewestRows = 64, TermsOfColumn = 16;

    /// <summary>Whether the product a b is one that this is faster at than libtorch.</summary>
    /// <param name="a">[m, k].</param>
    /// <param name="b">[k, n].</param>
    public static bool Takes(Tensor a, Tensor b) =>
        MatrixKernel.Takes(a) && b.dtype == a.dtype && a.is_contiguous() && b.is_contiguous() && Takes(a.size(0), b.size(0), b.size(1));

    /// <summary>The same of its shape.</summary>
    public static bool Takes(long m, long k, long n) => m >= FewestRows && k >= TermsOfColumn * n && k % 32 == 0 && n % 16 == 0;

    /// <summary>Memory of it beyond its arguments and its result, in bytes.</summary>
    public static long Bytes => sizeof(float) * Workers.Count * (long)Scratch;

    private const int Scratch = (TileRows * TileColumns) + (Depth * TileColumns / 2); // numbers of 32 bits

    /// <summary>a b, [m, n].</summary>
    /// <param name="a">[m, k].</param>
    /// <param name="b">[k, n].</param>
    /// <exception cref="ArgumentException">The factors do not fit each other.</exception>
    public static Tensor Multiply(Tensor a, Tensor b)
    {
        if (a.size(1) != b.size(0)) throw new ArgumentException($"Factors [{string.Join(", ", a.shape)}] and [{string.Join(", ", b.shape)}] have no product.", nameof(b));
        using var scope = NewDisposeScope();
        int m = (int)a.size(0), k = (int)a.size(1), n = (int)b.size(1), workers = Workers.Count;
        var (output, scratch) = (empty([m, n], a.dtype), empty([workers, Scratch], ScalarType.Float32));
        ushort* pa = (ushort*)MatrixKernel.Pointer(a), pb = (ushort*)MatrixKernel.Pointer(b), po = (ushort*)MatrixKernel.Pointer(output);
        float* room = (float*)MatrixKernel.Pointer(scratch);
        int across = (n + TileColumns - 1) / TileColumns, down = (m + TileRows - 1) / TileRows;
        Workers.Run(workers, across * down, (worker, task) =>
        {
            int row = task % down * TileRows, column = task / down * TileColumns, rows = Math.Min(TileRows, m - row), columns = Math.Min(TileColumns, n - column);
            float* sums = room + (worker * Scratch);
            Tile(rows, columns, k, n, pa + ((long)row * k), pb + column, sums, (ushort*)(sums + (TileRows * TileColumns)));
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < columns; c += 16)
                    VectorMath.Store(Vector512.Load(sums + (r * columns) + c), po + ((long)(row + r) * n) + column + c);
        });
        return output.MoveToOuterDisposeScope();
    }

    private static void Tile(int rows, int columns, int k, int n, ushort* a, ushort* b, float* sums, ushort* packed)
    {
        for (int term = 0; term < k; term += Depth)
        {
            int depth = Math.Min(Depth, k - term), next = Math.Min(Depth, k - term - depth);
            Tiles.PackRows(b + ((long)term * n), n, depth, depth, columns, packed);
            Tiles.Prefetch(b + ((long)(term + depth) * n), n, next, columns);
            Tiles.Prefetch(a + term + depth, k, rows, next);
            MatrixKernel.Multiply(rows, columns, depth, a + term, k, packed, columns, sums, columns, add: term > 0);
        }
    }
}
