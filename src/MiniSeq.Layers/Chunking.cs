using TorchSharp;

namespace MiniSeq.Layers;

/// <summary>How many rows one mini-sequence has, and the loop over them.</summary>
public static class Chunking
{
    /// <summary>Chunk size that asks for the automatic rule, <see cref="Rows"/>.</summary>
    public const int Auto = 0;

    /// <summary>The fewest rows at which a matrix product still runs at its full speed (measured: within 5% in bfloat16).</summary>
    public const int FullSpeedRows = 256;

    // One intermediate of a chunk. Small enough to stay in the last-level cache between a product and the element-wise passes over it.
    private const long IntermediateBytes = 8L << 20;

    /// <summary>
    /// The rows of one mini-sequence. A positive <paramref name="chunkSize"/> is taken as it is; <see cref="Auto"/> gives
    /// max(256, 8 MiB / (width · bytes)) rounded down to a multiple of 64, and never more than <paramref name="rows"/>.
    /// </summary>
    /// <param name="chunkSize">Rows of a chunk, or <see cref="Auto"/>.</param>
    /// <param name="rows">Rows there are: batch × sequence.</param>
    /// <param name="width">Columns of the widest intermediate: intermediate size, or vocabulary.</param>
    /// <param name="dtype">Element type of the intermediate.</param>
    /// <exception cref="ArgumentOutOfRangeException">A negative chunk size.</exception>
    public static long Rows(int chunkSize, long rows, long width, torch.ScalarType dtype)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(chunkSize);
        long wanted = chunkSize;
        if (chunkSize == Auto)
            wanted = Math.Max(FullSpeedRows, IntermediateBytes / (width * dtype.ElementSize()) / 64 * 64);
        return Math.Max(1, Math.Min(wanted, rows));
    }

    /// <summary>Calls <paramref name="body"/>(start, count) for each mini-sequence, each in a dispose scope of its own; the last may be shorter.</summary>
    public static void ForEach(long rows, long chunk, Action<long, long> body)
    {
        for (long start = 0; start < rows; start += chunk)
        {
            using var scope = torch.NewDisposeScope();
            body(start, Math.Min(chunk, rows - start));
        }
    }
}
