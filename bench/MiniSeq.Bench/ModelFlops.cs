namespace MiniSeq.Bench;

/// <summary>The floating point operations that a training step asks for, whatever a variant really does: the numerator of model FLOPs utilisation (MFU).</summary>
internal static class ModelFlops
{
    /// <summary>What is counted, for <c>--help</c>.</summary>
    public const string Formula =
        """
        mfu = (6 N tokens + attention) / seconds / rate of the fastest matrix product measured in the same run, in the variant's type.
        N: entries of the matrices that multiply (q, k, v, o, gate, up, down, LM head), without the input embedding; with --loss-fraction below 1
        the head's entries count by that share, the rest in full. With --lora it is 4 N: the base's weights have no gradient; the adapters' own
        small products are not counted. Attention, causal: 2 products of 2 S^2/2 heads head_dim a layer and document, times 3 (forward 1, backward 2).
        What is computed again in backward is not counted.
        """;

    /// <summary>FLOPs of a step.</summary>
    public static double Of(Shape shape)
    {
        double tokens = (double)shape.Seq * shape.Batch;
        double products = shape.Layers * LayerEntries(shape) + (double)shape.Vocab * shape.Hidden * shape.LossFraction;
        double attention = 3.0 * 2 * (2.0 * shape.Seq * shape.Seq / 2) * shape.Heads * HeadDim(shape) * shape.Layers * shape.Batch;
        return (shape.Lora > 0 ? 4 : 6) * products * tokens + attention;
    }

    private static double LayerEntries(Shape shape)
    {
        double queries = (double)shape.Heads * HeadDim(shape), keys = (double)shape.KvHeads * HeadDim(shape);
        return shape.Hidden * (2 * queries + 2 * keys + 3.0 * shape.Intermediate);
    }

    private static int HeadDim(Shape shape) => shape.Config.HeadDim;
}
