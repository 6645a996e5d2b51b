using System.Collections;
using System.Reflection;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// Hugging Face's <c>config.json</c> from and to <see cref="DecoderConfig"/>: what each <c>model_type</c> calls its settings, and what it
/// takes where a file is silent (the defaults of transformers' configuration classes).
/// </summary>
internal static class ConfigJson
{
    private static readonly JsonSerializerOptions s_indented = new() { WriteIndented = true };

    /// <summary>One model_type.</summary>
    /// <param name="Architecture">Entry of <c>architectures</c>.</param>
    /// <param name="Read">Adds the family's own settings to those that all have.</param>
    /// <param name="Write">Writes them.</param>
    private sealed record Family(string Architecture, Func<Fields, DecoderConfig, DecoderConfig> Read, Action<DecoderConfig, JsonObject> Write)
    {
        /// <summary>The file's silence means: as many as heads (null), hidden size / heads (null), and so on.</summary>
        public int? KeyValueHeads { get; init; }

        public int? HeadDim { get; init; }

        public int MaxPositions { get; init; } = 2048;

        public double NormEps { get; init; } = 1e-6;

        public bool Tied { get; init; }

        public string ActivationField { get; init; } = "hidden_act";

        public string Activation { get; init; } = "silu";
    }

    private static readonly Dictionary<string, Family> s_families = new()
    {
        ["llama"] = new("LlamaForCausalLM",
            (f, c) => WithBias(f, c) with { MlpBias = f.Bool("mlp_bias") ?? false },
            (c, json) => (json["attention_bias"], json["mlp_bias"]) = (c.QkvBias, c.MlpBias)),
        ["mistral"] = new("MistralForCausalLM",
            (f, c) => WithWindow(f, c, f.Has("sliding_window") ? f.Int("sliding_window") : 4096, _ => true),
            (c, json) => json["sliding_window"] = c.SlidingWindow)
        {
            KeyValueHeads = 8,
            MaxPositions = 131072,
        },
        ["qwen2"] = new("Qwen2ForCausalLM",
            (f, c) => WithQwenWindow(f, c with { QkvBias = true }),
            WriteQwenWindow)
        {
            KeyValueHeads = 32,
            MaxPositions = 32768,
        },
        ["qwen3"] = new("Qwen3ForCausalLM",
            (f, c) => WithQwenWindow(f, WithBias(f, c) with { QkNorm = true }),
            (c, json) =>
            {
                json["attention_bias"] = c.QkvBias;
                WriteQwenWindow(c, json);
            })
        {
            KeyValueHeads = 32,
            HeadDim = 128,
            MaxPositions = 32768,
        },
        ["gemma2"] = new("Gemma2ForCausalLM",
            (f, c) => WithWindow(f, WithBias(f, c), f.Has("sliding_window") ? f.Int("sliding_window") : 4096, layer => layer % 2 == 0) with
            {
                RmsNormUnitOffset = true,
                PostNorms = true,
                ScaleEmbeddings = true,
                QueryPreAttnScalar = f.Double("query_pre_attn_scalar") ?? 256,
                AttnLogitSoftcapping = f.Has("attn_logit_softcapping") ? f.Double("attn_logit_softcapping") : 50,
                FinalLogitSoftcapping = f.Has("final_logit_softcapping") ? f.Double("final_logit_softcapping") : 30,
            },
            (c, json) =>
            {
                json["attention_bias"] = c.QkvBias;
                json["hidden_activation"] = json["hidden_act"]!.DeepClone();
                json["query_pre_attn_scalar"] = c.QueryPreAttnScalar;
                json["attn_logit_softcapping"] = c.AttnLogitSoftcapping;
                json["final_logit_softcapping"] = c.FinalLogitSoftcapping;
                json["cache_implementation"] = "hybrid";
                WriteWindow(c, json);
            })
        {
            KeyValueHeads = 4,
            HeadDim = 256,
            MaxPositions = 8192,
            Tied = true,
            ActivationField = "hidden_activation", // hidden_act is there, too, and not read by transformers
            Activation = "gelu_pytorch_tanh",
        },
        ["phi3"] = new("Phi3ForCausalLM",
            (f, c) => WithWindow(f, c, f.Int("sliding_window"), _ => true),
            (c, json) =>
            {
                json["sliding_window"] = c.SlidingWindow;
                json["pad_token_id"] = c.PadTokenId; // transformers' own default is outside of small vocabularies
            })
        {
            MaxPositions = 4096,
            NormEps = 1e-5,
        },
    };

    public static DecoderConfig Read(string path)
    {
        string file = Directory.Exists(path) ? Path.Combine(path, "config.json") : path;
        if (!File.Exists(file)) throw new FileNotFoundException($"There is no model configuration at '{file}'. Give the folder of a Hugging Face checkpoint, with its config.json.", file);
        try
        {
            var json = JsonNode.Parse(File.ReadAllBytes(file)) as JsonObject ?? throw new InvalidDataException($"'{file}' holds no JSON object.");
            return Read(new Fields(json, $"'{file}'"));
        }
        catch (Exception e) when (e is JsonException or FormatException or InvalidOperationException or OverflowException)
        {
            throw new InvalidDataException($"'{file}' is not a valid config.json: {e.Message}", e);
        }
    }

    public static string Write(DecoderConfig config, ScalarType dtype)
    {
        if (!s_families.TryGetValue(config.ModelType, out var family)) throw new NotSupportedException($"model_type '{config.ModelType}' is not supported; {Supported} are.");
        var json = new JsonObject
        {
            ["architectures"] = new JsonArray(family.Architecture),
            ["model_type"] = config.ModelType,
            ["vocab_size"] = config.VocabSize,
            ["hidden_size"] = config.HiddenSize,
            ["intermediate_size"] = config.IntermediateSize,
            ["num_hidden_layers"] = config.NumHiddenLayers,
            ["num_attention_heads"] = config.NumAttentionHeads,
            ["num_key_value_heads"] = config.NumKeyValueHeads,
            ["head_dim"] = config.HeadDim,
            ["rms_norm_eps"] = config.RmsNormEps,
            ["rope_theta"] = config.RopeTheta,
            ["rope_scaling"] = Write(config.RopeScaling),
            ["tie_word_embeddings"] = config.TieWordEmbeddings,
            ["hidden_act"] = config.HiddenAct == Layers.Activation.Silu ? "silu" : "gelu_pytorch_tanh",
            ["max_position_embeddings"] = config.MaxPositionEmbeddings,
            ["initializer_range"] = config.InitializerRange,
            ["torch_dtype"] = dtype.ToString().ToLowerInvariant(),
        };
        if (config.BosTokenId is { } bos) json["bos_token_id"] = bos;
        if (config.EosTokenIds.Count == 1) json["eos_token_id"] = config.EosTokenIds[0];
        else if (config.EosTokenIds.Count > 1) json["eos_token_id"] = new JsonArray([.. config.EosTokenIds.Select(id => (JsonNode)id)]);
        if (config.PadTokenId is { } pad) json["pad_token_id"] = pad;
        family.Write(config, json);
        string text = json.ToJsonString(s_indented);
        CheckNothingLost(config, text);
        return text;
    }

    private static string Supported => string.Join(", ", s_families.Keys);

    private static DecoderConfig Read(Fields f)
    {
        string type = f.Text("model_type") ?? throw new InvalidDataException($"{f.Source} names no model_type.");
        if (!s_families.TryGetValue(type, out var family)) throw f.Refused($"model_type '{type}'", $"{Supported} are");
        RefuseWhatIsNotComputed(f);
        int hidden = f.Required("hidden_size"), heads = f.Required("num_attention_heads");
        var config = new DecoderConfig
        {
            ModelType = type,
            VocabSize = f.Required("vocab_size"),
            HiddenSize = hidden,
            IntermediateSize = f.Required("intermediate_size"),
            NumHiddenLayers = f.Required("num_hidden_layers"),
            NumAttentionHeads = heads,
            NumKeyValueHeads = f.Int("num_key_value_heads") ?? family.KeyValueHeads ?? heads,
            HeadDim = f.Int("head_dim") ?? family.HeadDim ?? (heads > 0 ? hidden / heads : 0),
            RmsNormEps = f.Double("rms_norm_eps") ?? family.NormEps,
            RopeTheta = f.Object("rope_parameters")?.Double("rope_theta") ?? f.Double("rope_theta") ?? 10000,
            RopeScaling = ReadRopeScaling(f),
            TieWordEmbeddings = f.Bool("tie_word_embeddings") ?? family.Tied,
            HiddenAct = Activation(f, family.ActivationField, family.Activation),
            MaxPositionEmbeddings = f.Int("max_position_embeddings") ?? family.MaxPositions,
            InitializerRange = f.Double("initializer_range") ?? 0.02,
            BosTokenId = f.Int("bos_token_id"),
            EosTokenIds = f.Ints("eos_token_id"),
            PadTokenId = f.Int("pad_token_id"),
        };
        return family.Read(f, config.Validated(f.Source)).Validated(f.Source);
    }

    private static void RefuseWhatIsNotComputed(Fields f)
    {
        if (f.Object("quantization_config") is not null) throw f.Refused("quantized weights (quantization_config)", "use the unquantized checkpoint");
        foreach (string dropout in new[] { "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout" })
            if (f.Double(dropout) is { } p and not 0) throw f.Refused($"{dropout} {p}", "0 is: set it in config.json to train without this dropout");
        if ((f.Object("rope_parameters")?.Double("partial_rotary_factor") ?? f.Double("partial_rotary_factor")) is { } part and not 1) throw f.Refused($"partial_rotary_factor {part}", "1 is");
        if (f.Bool("is_encoder_decoder") is true) throw f.Refused("is_encoder_decoder true", "decoders are");
    }

    private static DecoderConfig WithBias(Fields f, DecoderConfig c)
    {
        bool bias = f.Bool("attention_bias") ?? false;
        return c with { QkvBias = bias, OutputBias = bias };
    }

    // layer_types where the file has it, else the family's rule; a window that no layer uses is none.
    private static DecoderConfig WithWindow(Fields f, DecoderConfig c, int? window, Func<int, bool> slides)
    {
        var types = f.Strings("layer_types")?.Select(name => name switch
        {
            "full_attention" => LayerType.FullAttention,
            "sliding_attention" => LayerType.SlidingAttention,
            _ => throw f.Refused($"layer_types entry '{name}'", "full_attention and sliding_attention are"),
        }).ToArray() ?? [.. Enumerable.Range(0, c.NumHiddenLayers).Select(l => window is not null && slides(l) ? LayerType.SlidingAttention : LayerType.FullAttention)];
        if (!types.Contains(LayerType.SlidingAttention)) return c;
        return c with { SlidingWindow = window, LayerTypes = types.Length == c.NumHiddenLayers && !types.Contains(LayerType.FullAttention) ? null : types };
    }

    private static void WriteWindow(DecoderConfig c, JsonObject json)
    {
        json["sliding_window"] = c.SlidingWindow;
        json["layer_types"] = new JsonArray([.. Enumerable.Range(0, c.NumHiddenLayers).Select(l => (JsonNode)(c.WindowOf(l) is null ? "full_attention" : "sliding_attention"))]);
    }

    private static DecoderConfig WithQwenWindow(Fields f, DecoderConfig c)
    {
        int first = f.Int("max_window_layers") ?? 28;
        int? window = f.Bool("use_sliding_window") is true ? f.Int("sliding_window") ?? 4096 : null;
        return window is null ? c : WithWindow(f, c, window, layer => layer >= first);
    }

    private static void WriteQwenWindow(DecoderConfig c, JsonObject json)
    {
        json["use_sliding_window"] = c.SlidingWindow is not null;
        json["max_window_layers"] = Enumerable.Range(0, c.NumHiddenLayers).FirstOrDefault(l => c.WindowOf(l) is not null, c.NumHiddenLayers);
        WriteWindow(c, json);
    }

    private static RopeScaling? ReadRopeScaling(Fields f)
    {
        if ((f.Object("rope_parameters") ?? f.Object("rope_scaling")) is not { } s) return null;
        double Factor() => s.Double("factor") is { } factor and >= 1 ? factor : throw new InvalidDataException($"{f.Source}: rope_scaling needs a factor of at least 1.");
        switch (s.Text("rope_type") ?? s.Text("type") ?? (s.Has("factor") ? throw new InvalidDataException($"{f.Source}: rope_scaling has a factor and no rope_type.") : "default"))
        {
            case "default":
                return null;
            case "linear":
                return new LinearRopeScaling(Factor());
            case "llama3":
                var (low, high) = (s.RequiredDouble("low_freq_factor"), s.RequiredDouble("high_freq_factor"));
                if (!(low < high)) throw new InvalidDataException($"{f.Source}: low_freq_factor {low} of rope_scaling must be below high_freq_factor {high}.");
                return new Llama3RopeScaling(Factor(), low, high, s.Required("original_max_position_embeddings"));
            case "yarn":
                if (s.Bool("truncate") is false) throw f.Refused("rope_scaling with truncate false", "true is");
                int original = s.Int("original_max_position_embeddings") ?? f.Int("original_max_position_embeddings") ?? f.Required("max_position_embeddings");
                double factor = s.Has("factor") && s.Double("factor") is null ? (double)f.Required("max_position_embeddings") / original : Factor();
                return new YarnRopeScaling(factor, original, s.Double("beta_fast") ?? 32, s.Double("beta_slow") ?? 1, s.Double("attention_factor") ?? Temperature(s, factor));
            case var other:
                throw f.Refused($"rope_scaling of type '{other}'", "linear, llama3 and yarn are");
        }
    }

    // DeepSeek's way to write YaRN's temperature.
    private static double? Temperature(Fields s, double factor)
    {
        double Scale(double m) => factor <= 1 ? 1 : (0.1 * m * Math.Log(factor)) + 1;
        return s.Double("mscale") is { } m && s.Double("mscale_all_dim") is { } all && m != 0 && all != 0 ? Scale(m) / Scale(all) : null;
    }

    private static JsonObject? Write(RopeScaling? scaling) => scaling switch
    {
        null => null,
        LinearRopeScaling s => new JsonObject { ["rope_type"] = "linear", ["factor"] = s.Factor },
        Llama3RopeScaling s => new JsonObject
        {
            ["rope_type"] = "llama3",
            ["factor"] = s.Factor,
            ["low_freq_factor"] = s.LowFreqFactor,
            ["high_freq_factor"] = s.HighFreqFactor,
            ["original_max_position_embeddings"] = s.OriginalMaxPositionEmbeddings,
        },
        YarnRopeScaling s => new JsonObject
        {
            ["rope_type"] = "yarn",
            ["factor"] = s.Factor,
            ["original_max_position_embeddings"] = s.OriginalMaxPositionEmbeddings,
            ["beta_fast"] = s.BetaFast,
            ["beta_slow"] = s.BetaSlow,
            ["attention_factor"] = s.AttentionFactor,
        },
        _ => throw new NotSupportedException($"config.json has no name for {scaling}."),
    };

    private static Activation Activation(Fields f, string field, string otherwise) => (f.Text(field) ?? otherwise) switch
    {
        "silu" or "swish" => Layers.Activation.Silu,
        "gelu_pytorch_tanh" => Layers.Activation.GeluTanh,
        var name => throw f.Refused($"{field} '{name}'", "silu and gelu_pytorch_tanh are"),
    };

    // A setting that the family has no field for would silently be another model when read again.
    private static void CheckNothingLost(DecoderConfig config, string json)
    {
        var read = Read(new Fields((JsonObject)JsonNode.Parse(json)!, "the configuration"));
        foreach (var property in typeof(DecoderConfig).GetProperties(BindingFlags.Public | BindingFlags.Instance))
        {
            if (property.Name is nameof(DecoderConfig.LayerTypes) or nameof(DecoderConfig.RopeScaling)) continue;
            if (!Same(property.GetValue(config), property.GetValue(read))) throw Lost(property.Name);
        }
        if (!Same(Windows(config), Windows(read))) throw Lost(nameof(DecoderConfig.LayerTypes));

        static bool Same(object? a, object? b) => a is IEnumerable many && b is IEnumerable others ? many.Cast<object?>().SequenceEqual(others.Cast<object?>()) : Equals(a, b);
        static int?[] Windows(DecoderConfig c) => [.. Enumerable.Range(0, c.NumHiddenLayers).Select(c.WindowOf)];
        NotSupportedException Lost(string name) => new($"A model of model_type '{config.ModelType}' cannot be saved with this {name}: config.json has no place for it there. Set ModelType to the family it belongs to.");
    }

    /// <summary>Typed access to a JSON object; null is as good as absent.</summary>
    private sealed class Fields(JsonObject json, string source)
    {
        public string Source => source;

        /// <summary>Whether the field is there, if only as null, which some have for "none" where absent is a default.</summary>
        public bool Has(string name) => json.ContainsKey(name);

        public int? Int(string name) => Double(name) is { } value ? value is >= int.MinValue and <= int.MaxValue && (int)value is var whole && whole == value ? whole : throw new FormatException($"{name} is {value}, which is not a whole number of 32 bits") : null;

        public double? Double(string name) => Value(name, node => (double)node);

        public bool? Bool(string name) => Value(name, node => (bool)node);

        public string? Text(string name) => (string?)json[name];

        private T? Value<T>(string name, Func<JsonNode, T> read) where T : struct
        {
            if (json[name] is not { } node) return null;
            try
            {
                return read(node);
            }
            catch (Exception e) when (e is FormatException or InvalidOperationException or OverflowException)
            {
                throw new FormatException($"{name} is {node.ToJsonString()}, which is no {typeof(T).Name.ToLowerInvariant()}", e);
            }
        }

        public Fields? Object(string name) => json[name] switch
        {
            null => null,
            JsonObject o => new Fields(o, source),
            _ => throw new FormatException($"{name} is no JSON object"),
        };

        public IReadOnlyList<int> Ints(string name) => json[name] switch
        {
            null => [],
            JsonArray many => [.. many.Select(n => (int)n!)],
            var one => [(int)one],
        };

        public IReadOnlyList<string>? Strings(string name) => json[name] is { } list ? [.. list.AsArray().Select(n => (string)n!)] : null;

        public int Required(string name) => Int(name) ?? throw new InvalidDataException($"{source} lacks {name}.");

        public double RequiredDouble(string name) => Double(name) ?? throw new InvalidDataException($"{source} lacks {name}.");

        public NotSupportedException Refused(string what, string instead) => new($"{source}: {what} is not supported; {instead}.");
    }
}
