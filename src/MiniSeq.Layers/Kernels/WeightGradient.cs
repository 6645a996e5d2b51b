using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>The gradient of a weight of bfloat16 layers, accumulator += aᵀ b: products summed in float32 where they are accumulated, and never rounded to 16 bits.</summary>
internal static unsafe class WeightGradient
{
    private const int TileRows = 128, TaskRows = 512, MostProducts = 512;

    /// <summary>Memory of it beyond its arguments for so many rows, in bytes.</summary>
    public static long Bytes(long rows) => Workers.Count * (2L * TileRows + 256) * Math.Min(MostProducts, (rows + 31) / 32 * 32) * sizeof(ushort);

    /// <summary>accumulator += aᵀ b.</summary>
    /// <param name="accumulator">[m, n] float32, contiguous.</param>
    /// <param name="a">[rows, m] bfloat16.</param>
    /// <param name="b">[rows, n] bfloat16.</param>
    public static void Add(Tensor accumulator, Tensor a, Tensor b)
    {
        using var scope = NewDisposeScope();
        (a, b) = (a.contiguous(), b.contiguous());
        for (long start = 0; start < a.size(0); start += MostProducts)
        {
            long count = Math.Min(MostProducts, a.size(0) - start);
            AddPiece(accumulator, a.narrow(0, start, count), b.narrow(0, start, count));
        }
    }

    // The depth K of the product is the rows: padded, so that oneDNN meets few depths.
    private static void AddPiece(Tensor accumulator, Tensor a, Tensor b)
    {
        using var scope = NewDisposeScope();
        int rows = (int)a.size(0), depth = (rows + 31) / 32 * 32, m = (int)a.size(1), n = (int)b.size(1);
        int tileColumns = depth <= 512 ? 256 : 128; // two tiles and their sum stay in a core's cache
        int workers = Workers.Count;
        long left = (long)TileRows * depth, right = (long)tileColumns * depth;
        var scratch = empty([workers, (2 * left) + right], ScalarType.BFloat16);
        ushort* pa = (ushort*)MatrixKernel.Pointer(a), pb = (ushort*)MatrixKernel.Pointer(b), ps = (ushort*)MatrixKernel.Pointer(scratch);
        float* sum = (float*)MatrixKernel.Pointer(accumulator);
        int across = (n + tileColumns - 1) / tileColumns, down = (m + TaskRows - 1) / TaskRows;
        Workers.Run(workers, across * down, (worker, task) =>
        {
            ushort* at = ps + (worker * ((2 * left) + right)), pairs = at + left, packed = pairs + left;
            int column = task % across * tileColumns, columns = Math.Min(tileColumns, n - column);
            Tiles.PackRows(pb + column, n, rows, depth, columns, packed);
            for (int row = task / across * TaskRows, end = Math.Min(m, row + TaskRows); row < end; row += TileRows)
            {
                int count = Math.Min(TileRows, end - row);
                for (int r = 0; r < count; r++)
                    for (int c = 0; c < columns; c += 16) System.Runtime.Intrinsics.X86.Sse.Prefetch1(sum + ((long)(row + r) * n) + column + c);
                Tiles.TransposeRows(pa + row, m, rows, depth, count, at, pairs);
                MatrixKernel.Multiply(count, columns, depth, at, depth, packed, columns, sum + ((long)row * n) + column, n, add: true);
            }
        });
    }
}
