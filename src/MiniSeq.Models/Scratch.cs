using MiniSeq.Layers;
using MiniSeq.Layers.Kernels;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Bytes that the kernels of the layers take for themselves: here, and nowhere else in the memory plan, stands what depends on how a kernel is written.</summary>
internal sealed class Scratch(ScalarType dtype, Device? device)
{
    private const double FlashTilesHeld = 2, FlashNarrowTilesHeld = 3.63; // float32 tiles of one thread of libtorch's flash kernel in backward; the latter, of 16-bit types, measured
    private const long FlashKeys = 512;
    private const double TilesHeld = 2, NarrowTilesHeld = 3.5, QueryBlocksHeld = 7; // of TiledAttention in backward, measured
    private const double FewQueryBlocksHeld = 3, KeyBlocksHeld = 2, NarrowKeyBlocksHeld = 3; // the same where the keys of a tile are many more
    private const long MaskBytes = sizeof(long) + 2; // for each score of a tile: the distance of its tokens, and what is hidden

    /// <summary>Whether the layers use kernels of their own.</summary>
    public bool HasKernel { get; } = MatrixKernel.Takes(dtype, device?.type ?? DeviceType.CPU);

    /// <summary>Of accumulating the gradient of a weight [m, n]: a block of the product in 16 bits, and again in float32 to be added; of the kernel its packed factor and tiles.</summary>
    public long Product(long m, long n, long rows)
    {
        if (HasKernel) return WeightGradient.Bytes(n, rows);
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        return wide == element ? 0 : Math.Min(m, Math.Max(Gradients.FewestBlockRows, Gradients.BlockBytes / (n * element))) * n * (element + wide);
    }

    /// <summary>Of the gradient of what the head reads.</summary>
    public long HeadInput(long rows, DecoderConfig config) => HasKernel && LongProduct.Takes(rows, config.VocabSize, config.HiddenSize) ? LongProduct.Bytes : 0;

    /// <summary>Of the softmax of a chunk of logits: a block of rows in float32, where logits are not, and its tanh where they are capped.</summary>
    public long Softmax(long rows, DecoderConfig config)
    {
        if (HasKernel && config.FinalLogitSoftcapping is null) return 0;
        long wide = Gradients.AccumulationType(dtype).ElementSize();
        long block = Math.Min(rows, Math.Max(1, LinearCrossEntropy.SoftmaxBytes / (config.VocabSize * wide))) * config.VocabSize * wide;
        return (wide == dtype.ElementSize() ? 0 : block) + (config.FinalLogitSoftcapping is null ? 0 : block);
    }

    /// <summary>Of <see cref="RmsNorm.Backward"/>, for each number of x: five of its size in float32, in 16 bits x and dy, too, and dx; of the kernel dx alone.</summary>
    public long NormBackward(long width)
    {
        if (HasKernel && width % 16 == 0) return dtype.ElementSize();
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        return wide == element ? 5 * wide : (7 * wide) + element;
    }

    /// <summary>Of summing up a bias's gradient: its rows in float32, where they are not.</summary>
    public static long Bias(long rows, long width, ScalarType dtype)
    {
        long wide = Gradients.AccumulationType(dtype).ElementSize();
        return wide == dtype.ElementSize() ? 0 : rows * width * wide;
    }

    /// <summary>Of the flash kernel's backward. Its tiles are smaller for few queries.</summary>
    public static long Flash(long queries, long keys, ScalarType dtype)
    {
        long wide = Gradients.AccumulationType(dtype).ElementSize();
        long tile = (queries >= 768 ? 256 : queries >= 192 ? 64 : 32) * Math.Min(keys, FlashKeys) * wide;
        return (long)(get_num_threads() * tile * (wide == dtype.ElementSize() ? FlashTilesHeld : FlashNarrowTilesHeld));
    }

    /// <summary>Of attention in tiles, backward: tiles of scores and their gradients, blocks of queries, and the gradients of k and v in float32 until they are done.</summary>
    /// <param name="config">The model.</param>
    /// <param name="queries">Wanted rows of a document.</param>
    /// <param name="length">All of its rows.</param>
    /// <param name="window">Tokens that a token sees; null is all before it.</param>
    /// <param name="dtype">Type of q, k and v.</param>
    public static long Tiles(DecoderConfig config, long queries, long length, long? window, ScalarType dtype)
    {
        long element = dtype.ElementSize(), wide = Gradients.AccumulationType(dtype).ElementSize();
        long Numbers(long rows, long end) => rows * Math.Min(Attention.TileKeys, Math.Min(end, (window ?? end) + rows)); // of a tile whose queries end there
        long rest = queries % Attention.TileQueries, whole = queries < Attention.TileQueries ? 0 : Attention.TileQueries;
        int caps = config.AttnLogitSoftcapping is null ? 0 : 1;
        double tiles = (wide == element ? TilesHeld : NarrowTilesHeld) + caps, heads = config.NumAttentionHeads, keyHeads = config.NumKeyValueHeads;
        long tile = Math.Max(Numbers(whole, length - rest), Numbers(rest, length)), rows = Math.Max(whole, rest);
        double blocks = config.HeadDim * Math.Max(QueryBlocksHeld * rows * heads, (FewQueryBlocksHeld * rows * heads) + ((wide == element ? KeyBlocksHeld : NarrowKeyBlocksHeld) * Math.Min(Attention.TileKeys, length) * keyHeads));
        double working = Math.Max(((tile * tiles * heads) + blocks) * wide, tile * ((heads * wide * (1 + caps)) + MaskBytes));
        long keysValues = 2L * length * config.NumKeyValueHeads * config.HeadDim;
        return wide == element ? (long)working : (keysValues * (wide - element)) + Math.Max((long)working, keysValues * element);
    }
}
