using System.Text.Json;
using System.Text.Json.Nodes;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// The shape of a decoder, under the names of Hugging Face's <c>config.json</c>. Differences between model families are data here,
/// not subclasses.
/// </summary>
public sealed record DecoderConfig
{
    /// <summary>Hugging Face <c>model_type</c>.</summary>
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

    /// <summary>θ of the rotary embedding.</summary>
    public double RopeTheta { get; init; } = 10000;

    /// <summary>Whether the LM head is the embedding matrix.</summary>
    public bool TieWordEmbeddings { get; init; }

    /// <summary>Whether the q, k, v and o projections have biases.</summary>
    public bool AttentionBias { get; init; }

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
    public static DecoderConfig FromPretrained(string path)
    {
        string file = Directory.Exists(path) ? Path.Combine(path, "config.json") : path;
        if (!File.Exists(file)) throw new FileNotFoundException($"There is no model configuration at '{file}'. Give the folder of a Hugging Face checkpoint, with its config.json.", file);
        try
        {
            return Parse(JsonNode.Parse(File.ReadAllBytes(file)) as JsonObject ?? throw new InvalidDataException($"'{file}' holds no JSON object."), file);
        }
        catch (Exception e) when (e is JsonException or FormatException or InvalidOperationException or OverflowException)
        {
            throw new InvalidDataException($"'{file}' is not a valid config.json: {e.Message}", e);
        }
    }

    /// <summary>This configuration as Hugging Face's <c>config.json</c>.</summary>
    /// <param name="dtype">Type of the weights beside it, <c>torch_dtype</c>.</param>
    public string ToJson(ScalarType dtype)
    {
        var json = new JsonObject
        {
            ["architectures"] = new JsonArray("LlamaForCausalLM"),
            ["model_type"] = ModelType,
            ["vocab_size"] = VocabSize,
            ["hidden_size"] = HiddenSize,
            ["intermediate_size"] = IntermediateSize,
            ["num_hidden_layers"] = NumHiddenLayers,
            ["num_attention_heads"] = NumAttentionHeads,
            ["num_key_value_heads"] = NumKeyValueHeads,
            ["head_dim"] = HeadDim,
            ["rms_norm_eps"] = RmsNormEps,
            ["rope_theta"] = RopeTheta,
            ["tie_word_embeddings"] = TieWordEmbeddings,
            ["attention_bias"] = AttentionBias,
            ["mlp_bias"] = MlpBias,
            ["hidden_act"] = HiddenAct == Activation.Silu ? "silu" : "gelu_pytorch_tanh",
            ["max_position_embeddings"] = MaxPositionEmbeddings,
            ["initializer_range"] = InitializerRange,
            ["torch_dtype"] = dtype.ToString().ToLowerInvariant(),
        };
        if (BosTokenId is { } bos) json["bos_token_id"] = bos;
        if (EosTokenIds.Count == 1) json["eos_token_id"] = EosTokenIds[0];
        else if (EosTokenIds.Count > 1) json["eos_token_id"] = new JsonArray([.. EosTokenIds.Select(id => (JsonNode)id)]);
        return json.ToJsonString(new JsonSerializerOptions { WriteIndented = true });
    }

    private static DecoderConfig Parse(JsonObject json, string file)
    {
        string type = Text(json, "model_type") ?? throw new InvalidDataException($"'{file}' names no model_type.");
        if (type != "llama") throw new NotSupportedException($"'{file}': model_type '{type}' is not supported; this version computes 'llama'.");
        if (json["rope_scaling"] is JsonObject scaling) throw new NotSupportedException($"'{file}': rope_scaling {scaling.ToJsonString()} is not supported.");
        if (json["quantization_config"] is not null) throw new NotSupportedException($"'{file}': quantized weights (quantization_config) are not supported; use the unquantized checkpoint.");
        int hidden = Required(json, "hidden_size", file), heads = Required(json, "num_attention_heads", file);
        return new DecoderConfig
        {
            ModelType = type,
            VocabSize = Required(json, "vocab_size", file),
            HiddenSize = hidden,
            IntermediateSize = Required(json, "intermediate_size", file),
            NumHiddenLayers = Required(json, "num_hidden_layers", file),
            NumAttentionHeads = heads,
            NumKeyValueHeads = (int?)json["num_key_value_heads"] ?? heads,
            HeadDim = (int?)json["head_dim"] ?? (heads > 0 ? hidden / heads : 0),
            RmsNormEps = (double?)json["rms_norm_eps"] ?? 1e-6,
            RopeTheta = (double?)json["rope_theta"] ?? 10000,
            TieWordEmbeddings = (bool?)json["tie_word_embeddings"] ?? false,
            AttentionBias = (bool?)json["attention_bias"] ?? false,
            MlpBias = (bool?)json["mlp_bias"] ?? false,
            HiddenAct = ParseActivation(Text(json, "hidden_act") ?? "silu", file),
            MaxPositionEmbeddings = (int?)json["max_position_embeddings"] ?? 2048,
            InitializerRange = (double?)json["initializer_range"] ?? 0.02,
            BosTokenId = (int?)json["bos_token_id"],
            EosTokenIds = json["eos_token_id"] switch
            {
                null => [],
                JsonArray many => [.. many.Select(n => (int)n!)],
                var one => [(int)one],
            },
        }.Validated($"'{file}'");
    }

    private static Activation ParseActivation(string name, string file) => name switch
    {
        "silu" or "swish" => Activation.Silu,
        "gelu_pytorch_tanh" => Activation.GeluTanh,
        _ => throw new NotSupportedException($"'{file}': hidden_act '{name}' is not supported; silu and gelu_pytorch_tanh are."),
    };

    private static string? Text(JsonObject json, string name) => (string?)json[name];

    private static int Required(JsonObject json, string name, string file) =>
        (int?)json[name] ?? throw new InvalidDataException($"'{file}' lacks {name}.");

    private DecoderConfig Validated(string source)
    {
        (string Name, int Value)[] sizes = [("vocab_size", VocabSize), ("hidden_size", HiddenSize), ("intermediate_size", IntermediateSize),
            ("num_hidden_layers", NumHiddenLayers), ("num_attention_heads", NumAttentionHeads), ("num_key_value_heads", NumKeyValueHeads), ("head_dim", HeadDim)];
        foreach (var (name, value) in sizes)
            if (value <= 0) throw new InvalidDataException($"{source}: {name} is {value}; it must be positive.");
        if (NumAttentionHeads % NumKeyValueHeads != 0) throw new InvalidDataException($"{source}: {NumKeyValueHeads} key/value heads do not divide {NumAttentionHeads} attention heads.");
        if (HeadDim % 2 != 0) throw new InvalidDataException($"{source}: head_dim is {HeadDim}; rotary embedding needs an even one.");
        if (RmsNormEps < 0 || RopeTheta <= 0) throw new InvalidDataException($"{source}: rms_norm_eps {RmsNormEps} and rope_theta {RopeTheta} must not be negative, the latter not zero.");
        return this;
    }
}
