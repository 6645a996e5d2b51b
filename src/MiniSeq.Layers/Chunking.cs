using TorchSharp;

namespace MiniSeq.Layers;

/// <summary>How many rows one mini-sequence has, and the loop over them.</summary>
public static class Chunking
{
    /// <summary>Chunk size that asks for the automatic rule, <see cref="Rows"/>.</summary>
    public const int Auto = 0;

    /// <summary>The fewest rows at which a matrix product still runs at its full speed (measured: within 5% in bfloat16).</summary>
    public const int FullSpeedRows = 256;

    // One intermediate of a chunk. Each chunk reads and writes the whole weight gradient once: fewer rows would cost time, more only memory.
    private const long IntermediateBytes = 16L << 20;
    private const long LogitBytes = 128L << 20;
    private const long MostLogitRows = 1024;

    /// <summary>
    /// The rows of one mini-sequence. A positive <paramref name="chunkSize"/> is taken as it is; <see cref="Auto"/> gives
    /// max(256, 16 MiB / (width · bytes)) rounded down to a multiple of 64, and never more than <paramref name="rows"/>.
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

    /// <summary>
    /// The same for the LM head, of which one chunk holds nothing but its logits: <see cref="Auto"/> gives
    /// max(256, min(1024, 128 MiB / (V · bytes))) rounded down to a multiple of 64.
    /// </summary>
    public static long LogitRows(int chunkSize, long rows, long vocabulary, torch.ScalarType dtype) =>
        Rows(chunkSize == Auto ? (int)Math.Max(FullSpeedRows, Math.Min(MostLogitRows, LogitBytes / (vocabulary * dtype.ElementSize())) / 64 * 64) : chunkSize, rows, vocabulary, dtype);

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
