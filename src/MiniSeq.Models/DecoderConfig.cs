using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>What a layer's attention sees, Hugging Face <c>layer_types</c>.</summary>
public enum LayerType
{
    /// <summary>All tokens before.</summary>
    FullAttention,

    /// <summary>The last <see cref="DecoderConfig.SlidingWindow"/> tokens.</summary>
    SlidingAttention,
}

/// <summary>
/// The shape of a decoder, under the names of Hugging Face's <c>config.json</c>. Differences between model families are data here,
/// not subclasses; <see cref="ConfigJson"/> knows which family has which.
/// </summary>
public sealed record DecoderConfig
{
    private const int MostLayers = 10_000; // a damaged file must not make a list of two billion

    /// <summary>Hugging Face <c>model_type</c>: how configuration and weights are written. What is computed, the other settings say.</summary>
    public string ModelType { get; init; } = "llama";

    /// <summary>V, rows of the embedding and columns of the logits.</summary>
    public required int VocabSize { get; init; }

    /// <summary>d, the width of the residual stream.</summary>
    public required int HiddenSize { get; init; }

    /// <summary>I, the width inside the MLP.</summary>
    public required int IntermediateSize { get; init; }

    /// <summary>L, decoder layers.</summary>
    public required int NumHiddenLayers { get; init; }

    /// <summary>Query heads of a layer.</summary>
    public required int NumAttentionHeads { get; init; }

    /// <summary>Key/value heads of a layer: divides the query heads.</summary>
    public required int NumKeyValueHeads { get; init; }

    /// <summary>D, the width of a head; usually hidden size / heads.</summary>
    public required int HeadDim { get; init; }

    /// <summary>ε of the norms.</summary>
    public double RmsNormEps { get; init; } = 1e-6;

    /// <summary>Whether norms scale by 1 + w (Gemma).</summary>
    public bool RmsNormUnitOffset { get; init; }

    /// <summary>Whether attention and MLP have a norm behind them, too, before the residual is added (Gemma 2's four norms a layer).</summary>
    public bool PostNorms { get; init; }

    /// <summary>Whether queries and keys have a norm over each head, before rotation (Qwen3).</summary>
    public bool QkNorm { get; init; }

    /// <summary>θ of the rotary embedding.</summary>
    public double RopeTheta { get; init; } = 10000;

    /// <summary>How the rotary embedding is stretched; null is not.</summary>
    public RopeScaling? RopeScaling { get; init; }

    /// <summary>Tokens that a token of a sliding layer sees, itself among them; null lets all layers see everything.</summary>
    public int? SlidingWindow { get; init; }

    /// <summary>Which layers slide, one entry a layer; null is all of them where there is a window.</summary>
    public IReadOnlyList<LayerType>? LayerTypes { get; init; }

    /// <summary>Scores s of attention become c · tanh(s / c) (Gemma 2).</summary>
    public double? AttnLogitSoftcapping { get; init; }

    /// <summary>The same for logits.</summary>
    public double? FinalLogitSoftcapping { get; init; }

    /// <summary>Attention's scale is its power −½; null is the head's width.</summary>
    public double? QueryPreAttnScalar { get; init; }

    /// <summary>Whether embeddings are multiplied by √d, rounded to their type (Gemma).</summary>
    public bool ScaleEmbeddings { get; init; }

    /// <summary>Whether the LM head is the embedding matrix.</summary>
    public bool TieWordEmbeddings { get; init; }

    /// <summary>Whether the q, k and v projections have biases.</summary>
    public bool QkvBias { get; init; }

    /// <summary>Whether the o projection has a bias.</summary>
    public bool OutputBias { get; init; }

    /// <summary>Whether the gate, up and down projections have biases.</summary>
    public bool MlpBias { get; init; }

    /// <summary>Activation of the MLP.</summary>
    public Activation HiddenAct { get; init; } = Activation.Silu;

    /// <summary>The longest sequence the model was made for, in tokens. A longer one is allowed.</summary>
    public int MaxPositionEmbeddings { get; init; } = 2048;

    /// <summary>Standard deviation of new weights.</summary>
    public double InitializerRange { get; init; } = 0.02;

    /// <summary>First token of a text, where the model has one.</summary>
    public int? BosTokenId { get; init; }

    /// <summary>Tokens that end a text.</summary>
    public IReadOnlyList<int> EosTokenIds { get; init; } = [];

    /// <summary>Token that fills a batch. Batches have no filling here: where it is in a text it is a token like any other, while Hugging Face's embedding gives it no gradient.</summary>
    public int? PadTokenId { get; init; }

    /// <summary>Whether files have q, k and v in one matrix, and gate and up.</summary>
    internal bool FusedProjections => ModelType == "phi3";

    /// <summary>Factor of Q Kᵀ.</summary>
    public double AttentionScale => 1 / Math.Sqrt(QueryPreAttnScalar ?? HeadDim);

    /// <summary>How many tokens a token of a layer sees, itself among them; null is all.</summary>
    public int? WindowOf(int layer) => LayerTypes is null || LayerTypes[layer] == LayerType.SlidingAttention ? SlidingWindow : null;

    /// <summary>A Llama-like configuration by its sizes.</summary>
    public static DecoderConfig Llama(int vocabSize, int hiddenSize, int intermediateSize, int layers, int heads, int kvHeads, bool tieWordEmbeddings = false) => new DecoderConfig
    {
        VocabSize = vocabSize,
        HiddenSize = hiddenSize,
        IntermediateSize = intermediateSize,
        NumHiddenLayers = layers,
        NumAttentionHeads = heads,
        NumKeyValueHeads = kvHeads,
        HeadDim = heads > 0 ? hiddenSize / heads : 0,
        TieWordEmbeddings = tieWordEmbeddings,
    }.Validated("the configuration");

    /// <summary>Reads <c>config.json</c>.</summary>
    /// <param name="path">The file, or the folder that holds it.</param>
    /// <exception cref="FileNotFoundException">There is no such file.</exception>
    /// <exception cref="InvalidDataException">The file is damaged, or a value does not fit.</exception>
    /// <exception cref="NotSupportedException">An architecture or setting that this library does not compute.</exception>
    public static DecoderConfig FromPretrained(string path) => ConfigJson.Read(path);

    /// <summary>This configuration as Hugging Face's <c>config.json</c>.</summary>
    /// <param name="dtype">Type of the weights beside it, <c>torch_dtype</c>.</param>
    /// <exception cref="NotSupportedException">Models of this <see cref="ModelType"/> do not have one of the settings.</exception>
    public string ToJson(ScalarType dtype) => ConfigJson.Write(this, dtype);

    internal DecoderConfig Validated(string source)
    {
        (string Name, int Value)[] sizes = [("vocab_size", VocabSize), ("hidden_size", HiddenSize), ("intermediate_size", IntermediateSize),
            ("num_hidden_layers", NumHiddenLayers), ("num_attention_heads", NumAttentionHeads), ("num_key_value_heads", NumKeyValueHeads), ("head_dim", HeadDim)];
        foreach (var (name, value) in sizes)
            Check(value > 0, $"{name} is {value}; it must be positive");
        Check(NumHiddenLayers <= MostLayers, $"num_hidden_layers is {NumHiddenLayers}; at most {MostLayers} are supported");
        Check(NumAttentionHeads % NumKeyValueHeads == 0, $"{NumKeyValueHeads} key/value heads do not divide {NumAttentionHeads} attention heads");
        Check(HeadDim % 2 == 0, $"head_dim is {HeadDim}; rotary embedding needs an even one");
        Check(RmsNormEps >= 0 && RopeTheta > 0, $"rms_norm_eps {RmsNormEps} and rope_theta {RopeTheta} must not be negative, the latter not zero");
        Check(SlidingWindow is null or > 0, $"sliding_window is {SlidingWindow}; it must be positive, or null");
        Check(LayerTypes is null || LayerTypes.Count == NumHiddenLayers, $"layer_types has {LayerTypes?.Count} entries for {NumHiddenLayers} layers");
        Check(LayerTypes?.Contains(LayerType.SlidingAttention) is not true || SlidingWindow is not null, "layer_types names sliding_attention, and there is no sliding_window");
        Check(AttnLogitSoftcapping is null or > 0 && FinalLogitSoftcapping is null or > 0 && QueryPreAttnScalar is null or > 0,
            $"attn_logit_softcapping {AttnLogitSoftcapping}, final_logit_softcapping {FinalLogitSoftcapping} and query_pre_attn_scalar {QueryPreAttnScalar} must be positive where they are given");
        return this;

        void Check(bool holds, string fault)
        {
            if (!holds) throw new InvalidDataException($"{source}: {fault}.");
        }
    }
}
