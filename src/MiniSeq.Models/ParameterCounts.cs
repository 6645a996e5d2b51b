using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// How many numbers a model's parameters are, module by module, from its configuration alone: a model need not fit into memory to be planned.
/// Modules are numbered from the embedding, 0, over the layers, 1..L, to the head with the last norm, L + 1: backward ends with 0.
/// </summary>
internal sealed class ParameterCounts(DecoderConfig config, ScalarType dtype, LoraConfig? adapter)
{
    private readonly long _queries = (long)config.NumAttentionHeads * config.HeadDim;
    private readonly long _keys = (long)config.NumKeyValueHeads * config.HeadDim;

    public ScalarType DType => dtype;

    /// <summary>Number of the head, the last of the modules.</summary>
    public int Head => config.NumHiddenLayers + 1;

    /// <summary>Whether the head is the embedding: one matrix, of module 0.</summary>
    public bool Tied => config.TieWordEmbeddings;

    /// <summary>Whether adapters are trained, and not the weights.</summary>
    public bool IsAdapted => adapter is not null;

    /// <summary>r of the adapters; 0 without them.</summary>
    public long Rank => adapter?.R ?? 0;

    /// <summary>V · d.</summary>
    public long Vocabulary => (long)config.VocabSize * config.HiddenSize;

    /// <summary>All parameters but those of adapters.</summary>
    public long Weights => Vocabulary + (config.NumHiddenLayers * Layer) + HeadWeights;

    /// <summary>All parameters of adapters.</summary>
    public long Adapters => Enumerable.Range(0, Head + 1).Sum(Adapter);

    /// <summary>Trained parameters of a module.</summary>
    public long Trained(int module) =>
        IsAdapted ? Adapter(module) : module == 0 ? Vocabulary : module == Head ? HeadWeights : Layer;

    private long HeadWeights => (Tied ? 0 : Vocabulary) + config.HiddenSize;

    private long Layer => Projections.Sum(p => p.In * p.Out) + Biases + Norms;

    private long Biases => (config.QkvBias ? _queries + (2 * _keys) : 0) + (config.OutputBias ? config.HiddenSize : 0) + (config.MlpBias ? (2L * config.IntermediateSize) + config.HiddenSize : 0);

    private long Norms => ((config.PostNorms ? 4L : 2) * config.HiddenSize) + (config.QkNorm ? 2L * config.HeadDim : 0);

    private (string Name, long In, long Out)[] Projections =>
    [
        ("self_attn.q_proj", config.HiddenSize, _queries), ("self_attn.k_proj", config.HiddenSize, _keys), ("self_attn.v_proj", config.HiddenSize, _keys),
        ("self_attn.o_proj", _queries, config.HiddenSize), ("mlp.gate_proj", config.HiddenSize, config.IntermediateSize),
        ("mlp.up_proj", config.HiddenSize, config.IntermediateSize), ("mlp.down_proj", config.IntermediateSize, config.HiddenSize),
    ];

    // r (in + out) for each matrix that has an adapter.
    private long Adapter(int module)
    {
        if (adapter is null) return 0;
        if (module == 0) return Pair("model.embed_tokens", config.VocabSize, config.HiddenSize);
        if (module == Head) return Pair("lm_head", config.HiddenSize, config.VocabSize);
        return Projections.Sum(p => Pair($"model.layers.{module - 1}.{p.Name}", p.In, p.Out));
    }

    private long Pair(string name, long input, long output) => LoraExtensions.IsTarget(name, adapter!) ? adapter!.R * (input + output) : 0;
}
