using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>The gradient of a weight of bfloat16 layers, sum += aᵀ b: products summed in float32 where they are accumulated, and never rounded to 16 bits.</summary>
/// <remarks>The right factor is packed once for all tiles; a tile of the left one is transposed once for all columns, and stays in its core's cache with the sums beside it.</remarks>
internal static unsafe class WeightGradient
{
    private const int TileRows = 128, TileColumns = 256, MostDepth = 512;
    private const int TasksOfWorker = 4; // at least, so that none waits long for the last

    /// <summary>Memory of it beyond its arguments for a weight of n columns and so many rows, in bytes.</summary>
    public static long Bytes(long n, long rows)
    {
        long depth = Math.Min(MostDepth, Padded(rows));
        return sizeof(ushort) * depth * (n + (Workers.Count * 2L * TileRows));
    }

    /// <summary>sum += aᵀ b, or sum = aᵀ b.</summary>
    /// <param name="sum">[m, n] float32, contiguous.</param>
    /// <param name="a">[rows, m] bfloat16.</param>
    /// <param name="b">[rows, n] bfloat16.</param>
    /// <param name="add">Whether the sum has a value already.</param>
    /// <exception cref="ArgumentException">The factors differ in rows or type.</exception>
    public static void Add(Tensor sum, Tensor a, Tensor b, bool add = true)
    {
        if (a.size(0) != b.size(0) || a.dtype != b.dtype)
            throw new ArgumentException($"Factors of {a.size(0)} rows in {a.dtype} and {b.size(0)} in {b.dtype} have no product aᵀ b.", nameof(b));
        if (!add && a.size(0) == 0) sum.zero_();
        if (a.size(1) == 0 || b.size(1) == 0) return;
        using var scope = NewDisposeScope();
        (a, b) = (a.contiguous(), b.contiguous());
        for (long start = 0; start < a.size(0); start += MostDepth)
        {
            long count = Math.Min(MostDepth, a.size(0) - start);
            AddPiece(sum, a.narrow(0, start, count), b.narrow(0, start, count), add || start > 0);
        }
    }

    // The depth K of the product is the rows: padded, so that oneDNN meets few depths.
    private static long Padded(long rows) => (rows + 31) / 32 * 32;

    private static void AddPiece(Tensor sum, Tensor a, Tensor b, bool add)
    {
        using var scope = NewDisposeScope();
        int rows = (int)a.size(0), depth = (int)Padded(rows), m = (int)a.size(1), n = (int)b.size(1), workers = Workers.Count;
        long left = (long)TileRows * depth;
        var (packed, scratch) = (empty([n, depth], ScalarType.BFloat16), empty([workers, 2 * left], ScalarType.BFloat16));
        ushort* pa = (ushort*)MatrixKernel.Pointer(a), pb = (ushort*)MatrixKernel.Pointer(b), pp = (ushort*)MatrixKernel.Pointer(packed), ps = (ushort*)MatrixKernel.Pointer(scratch);
        float* target = (float*)MatrixKernel.Pointer(sum);
        int across = (n + TileColumns - 1) / TileColumns, down = (m + TileRows - 1) / TileRows;
        Workers.Run(workers, across, (_, task) =>
        {
            int column = task * TileColumns;
            Tiles.PackRows(pb + column, n, rows, depth, Math.Min(TileColumns, n - column), pp + ((long)column * depth));
        });
        int parts = Math.Clamp(TasksOfWorker * workers / down, 1, across); // of the columns, where the weight has few rows
        int together = (across + parts - 1) / parts;
        Workers.Run(workers, down * parts, (worker, task) =>
        {
            int row = task / parts * TileRows, count = Math.Min(TileRows, m - row);
            int first = task % parts * together, end = Math.Min(across, first + together);
            if (first >= end) return;
            ushort* at = ps + (worker * 2 * left), pairs = at + left;
            float* sums = target + ((long)row * n);
            Prefetch(sums, n, count, first);
            Tiles.TransposeRows(pa + row, m, rows, depth, count, at, pairs);
            for (int tile = first; tile < end; tile++)
            {
                int column = tile * TileColumns, columns = Math.Min(TileColumns, n - column);
                if (tile + 1 < end) Prefetch(sums, n, count, tile + 1);
                MatrixKernel.Multiply(count, columns, depth, at, depth, pp + ((long)column * depth), columns, sums + column, n, add);
            }
        });
    }

    private static void Prefetch(float* sums, int n, int count, int tile)
    {
        int column = tile * TileColumns;
        Tiles.Prefetch((ushort*)(sums + column), 2L * n, count, 2 * Math.Min(TileColumns, n - column)); // two words of 16 bits each
    }
}
