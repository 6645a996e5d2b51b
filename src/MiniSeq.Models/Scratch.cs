using MiniSeq.Layers;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Bytes that the kernels of the layers take for themselves: here, and nowhere else in the memory plan, stands what depends on how a kernel is written.</summary>
internal static class Scratch
{
    private const long ProductBytes = 16 << 20;    // of a block in Gradients.AddProduct
    private const long FewestProductRows = 256;
    private const long SoftmaxBytes = 8 << 20;     // of a block in LinearCrossEntropy
    private const long FlashBytes = 1 << 20;       // of one thread of libtorch's flash kernel in backward: two tiles of 256 x 512 in float32
    private const long FlashNarrowBytes = 2 << 20; // the same for 16-bit types, with their copies: 1.8 MiB measured
    private const double TilesHeld = 2, NarrowTilesHeld = 3.5, QueryBlocksHeld = 7; // of TiledAttention in backward, measured

    /// <summary>Of accumulating the gradient of a weight [m, n]: a block of the product in 16 bits, and again in float32 to be added.</summary>
    public static long Product(long m, long n, ScalarType dtype)
    {
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        return wide == element ? 0 : Math.Min(m, Math.Max(FewestProductRows, ProductBytes / (n * element))) * n * (element + wide);
    }

    /// <summary>Of the softmax of a chunk of logits: a block of rows in float32, where logits are not, and its tanh where they are capped.</summary>
    public static long Softmax(long rows, DecoderConfig config, ScalarType dtype)
    {
        long wide = Gradients.AccumulationType(dtype).ElementSize();
        long block = Math.Min(rows, Math.Max(1, SoftmaxBytes / (config.VocabSize * wide))) * config.VocabSize * wide;
        return (wide == dtype.ElementSize() ? 0 : block) + (config.FinalLogitSoftcapping is null ? 0 : block);
    }

    /// <summary>Of <see cref="RmsNorm.Backward"/>, for each number of x: five of its size in float32, in 16 bits x and dy, too, and dx.</summary>
    public static long NormBackward(ScalarType dtype)
    {
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        return wide == element ? 5 * wide : (7 * wide) + element;
    }

    /// <summary>Of the flash kernel's backward.</summary>
    public static long Flash(ScalarType dtype) => get_num_threads() * (dtype.ElementSize() < sizeof(float) ? FlashNarrowBytes : FlashBytes);

    /// <summary>Of attention in tiles, backward: tiles of scores and their gradients, blocks of queries, and the gradients of k and v in float32 until they are done.</summary>
    public static long Tiles(DecoderConfig config, BatchShape batch, ScalarType dtype)
    {
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        long queries = Math.Min(batch.LongestDocument, Attention.TileQueries), keys = Math.Min(batch.LongestDocument, Attention.TileKeys);
        double tiles = (wide == element ? TilesHeld : NarrowTilesHeld) + (config.AttnLogitSoftcapping is null ? 0 : 1);
        double working = ((tiles * keys) + (QueryBlocksHeld * config.HeadDim)) * queries * config.NumAttentionHeads * wide;
        long keysValues = 2L * batch.LongestDocument * config.NumKeyValueHeads * config.HeadDim;
        return wide == element ? (long)working : (keysValues * (wide - element)) + Math.Max((long)working, keysValues * element);
    }
}
