using System.Text.Json;
using System.Text.Json.Nodes;

namespace MiniSeq.Models;

/// <summary>A LoRA adapter's settings (Hu et al. 2021, arXiv 2106.09685), under the names of PEFT's <c>adapter_config.json</c>.</summary>
public sealed record LoraConfig
{
    private static readonly string[] s_allLinear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    // What would change the computation, if it were anything but null, false or empty.
    private static readonly string[] s_unsupported =
    [
        "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "exclude_modules", "target_parameters", "layers_pattern", "rank_pattern",
        "alpha_pattern", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "megatron_config", "arrow_config", "ensure_weight_tying",
    ];

    /// <summary>r, columns of B.</summary>
    public int R { get; init; } = 8;

    /// <summary>The update is lora_alpha / r · B A.</summary>
    public double LoraAlpha { get; init; } = 8;

    /// <summary>Probability that an element of a layer's input is dropped on the way to A, in training.</summary>
    public double LoraDropout { get; init; }

    /// <summary>Whether the update is lora_alpha / √r · B A (rank-stabilized LoRA, arXiv 2312.03732).</summary>
    public bool UseRslora { get; init; }

    /// <summary>
    /// Modules that get an adapter, by the ends of their names: projections of the layers (all seven unless you say otherwise),
    /// <c>embed_tokens</c>, <c>lm_head</c>.
    /// </summary>
    public IReadOnlyList<string> TargetModules { get; init; } = s_allLinear;

    /// <summary>Numbers of the layers that get one; null is all. Modules outside the layers get none where it is given.</summary>
    public IReadOnlyList<int>? LayersToTransform { get; init; }

    /// <summary>The model that the adapter was made for.</summary>
    public string? BaseModelNameOrPath { get; init; }

    /// <summary>s in s · B A.</summary>
    public double Scaling => LoraAlpha / (UseRslora ? Math.Sqrt(R) : R);

    /// <summary>Reads <c>adapter_config.json</c>.</summary>
    /// <param name="path">The file, or the folder that holds it.</param>
    /// <exception cref="FileNotFoundException">There is no such file.</exception>
    /// <exception cref="InvalidDataException">The file is damaged, or a value is outside its range.</exception>
    /// <exception cref="NotSupportedException">A kind of adapter, or a setting, that this library does not compute.</exception>
    public static LoraConfig FromPretrained(string path)
    {
        string file = Directory.Exists(path) ? Path.Combine(path, LoraExtensions.ConfigName) : path;
        if (!File.Exists(file)) throw new FileNotFoundException($"There is no adapter configuration at '{file}'. Give the folder of a PEFT adapter, with its {LoraExtensions.ConfigName}.", file);
        try
        {
            return Parse(JsonNode.Parse(File.ReadAllBytes(file)) as JsonObject ?? throw new InvalidDataException($"'{file}' holds no JSON object."), file);
        }
        catch (Exception e) when (e is JsonException or FormatException or InvalidOperationException or OverflowException or ArgumentException)
        {
            throw new InvalidDataException($"'{file}' is not a valid {LoraExtensions.ConfigName}: {e.Message}", e);
        }
    }

    /// <summary>These settings as PEFT's <c>adapter_config.json</c>.</summary>
    public string ToJson() => new JsonObject
    {
        ["alpha_pattern"] = new JsonObject(),
        ["auto_mapping"] = null,
        ["base_model_name_or_path"] = BaseModelNameOrPath,
        ["bias"] = "none",
        ["fan_in_fan_out"] = false,
        ["inference_mode"] = true,
        ["init_lora_weights"] = true,
        ["layers_pattern"] = null,
        ["layers_to_transform"] = LayersToTransform is null ? null : new JsonArray([.. LayersToTransform.Select(l => (JsonNode)l)]),
        ["lora_alpha"] = LoraAlpha,
        ["lora_dropout"] = LoraDropout,
        ["modules_to_save"] = null,
        ["peft_type"] = "LORA",
        ["r"] = R,
        ["rank_pattern"] = new JsonObject(),
        ["revision"] = null,
        ["target_modules"] = new JsonArray([.. TargetModules.Select(m => (JsonNode)m)]),
        ["task_type"] = "CAUSAL_LM",
        ["use_dora"] = false,
        ["use_rslora"] = UseRslora,
    }.ToJsonString(new JsonSerializerOptions { WriteIndented = true });

    /// <summary>Throws where a setting is outside its range.</summary>
    /// <exception cref="ArgumentException">Names the setting and its value.</exception>
    public void Validate()
    {
        Check(R > 0, "r", R, "positive");
        Check(double.IsFinite(LoraAlpha), "lora_alpha", LoraAlpha, "finite");
        Check(LoraDropout is >= 0 and < 1, "lora_dropout", LoraDropout, "in [0, 1)");
        Check(TargetModules is { Count: > 0 } && !TargetModules.Contains(""), "target_modules", $"[{string.Join(", ", TargetModules ?? [])}]", "names of modules, at least one");
        Check(LayersToTransform is null or { Count: > 0 }, "layers_to_transform", "empty", "null for all layers, or name some");

        static void Check(bool holds, string name, object value, string range)
        {
            if (!holds) throw new ArgumentException(FormattableString.Invariant($"{name} is {value}; it must be {range}."));
        }
    }

    private static LoraConfig Parse(JsonObject json, string file)
    {
        if ((string?)json["peft_type"] is not "LORA") throw Unsupported(json, "peft_type", file, "\"LORA\" is");
        if ((string?)json["task_type"] is not (null or "CAUSAL_LM")) throw Unsupported(json, "task_type", file, "\"CAUSAL_LM\" is");
        if ((string?)json["bias"] is not (null or "none")) throw Unsupported(json, "bias", file, "\"none\" is");
        // The other ways of drawing A and B also change the weights below them.
        if (json["init_lora_weights"] is JsonValue init && init.GetValueKind() == JsonValueKind.String && (string?)init is not ("gaussian" or "orthogonal" or "eva"))
            throw Unsupported(json, "init_lora_weights", file, "true, false, \"gaussian\", \"orthogonal\" and \"eva\" are");
        foreach (string name in s_unsupported)
            if (!IsOff(json[name])) throw Unsupported(json, name, file, "null or false is");
        var config = new LoraConfig
        {
            R = (int?)json["r"] ?? 8,
            LoraAlpha = (double?)json["lora_alpha"] ?? 8,
            LoraDropout = (double?)json["lora_dropout"] ?? 0,
            UseRslora = (bool?)json["use_rslora"] ?? false,
            TargetModules = Targets(json, file),
            LayersToTransform = json["layers_to_transform"] switch
            {
                null => null,
                JsonArray many => [.. many.Select(n => (int)n!)],
                var one => [(int)one],
            },
            BaseModelNameOrPath = (string?)json["base_model_name_or_path"],
        };
        config.Validate();
        return config;
    }

    private static IReadOnlyList<string> Targets(JsonObject json, string file) => json["target_modules"] switch
    {
        JsonArray names => [.. names.Select(n => (string?)n ?? "")],
        JsonValue value when (string?)value == "all-linear" => s_allLinear,
        null => throw new InvalidDataException($"'{file}' lacks target_modules."),
        _ => throw Unsupported(json, "target_modules", file, "a list of names and \"all-linear\" are"),
    };

    private static bool IsOff(JsonNode? value) => value switch
    {
        null or JsonObject { Count: 0 } or JsonArray { Count: 0 } => true,
        JsonValue single => single.GetValueKind() == JsonValueKind.False,
        _ => false,
    };

    private static NotSupportedException Unsupported(JsonObject json, string name, string file, string supported) =>
        new($"'{file}': {name} {json[name]?.ToJsonString() ?? "null"} is not supported; {supported}.");
}
