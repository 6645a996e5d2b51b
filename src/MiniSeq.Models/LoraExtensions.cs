using System.Text;
using MiniSeq.Layers;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// LoRA adapters of a model (Hu et al. 2021, arXiv 2106.09685), from and to PEFT's folders: <c>adapter_config.json</c> and
/// <c>adapter_model.safetensors</c>. A model that carries one trains nothing else.
/// </summary>
public static class LoraExtensions
{
    internal const string ConfigName = "adapter_config.json";

    /// <summary>Whether a folder holds an adapter.</summary>
    internal static bool IsAdapter(string folder) => File.Exists(Path.Combine(folder, ConfigName));

    private const string WeightsName = "adapter_model.safetensors";
    private const string Head = "lm_head";
    private const string KeyPrefix = "base_model.model.";
    private const string BaseLayer = ".base_layer";

    /// <summary>Adds a new adapter, which changes nothing yet: B is 0 and A random, from torch's random state. All other parameters are frozen.</summary>
    /// <param name="model">Without an adapter.</param>
    /// <param name="config">Rank, scale, dropout and the modules to adapt.</param>
    /// <exception cref="ArgumentException">A setting is outside its range, or names a module or layer that the model does not have.</exception>
    /// <exception cref="InvalidOperationException">The model carries an adapter already.</exception>
    /// <exception cref="NotSupportedException">Phi-3.</exception>
    public static void AddAdapter(this CausalLM model, LoraConfig config)
    {
        var targets = Targets(model, config);
        Attach(model, config, targets);
        foreach (var target in targets) Initialize(target);
    }

    /// <summary>Adds an adapter that was saved by PEFT or <see cref="SaveAdapter"/>, to be used as it is or trained further.</summary>
    /// <param name="model">The model it was made for, without an adapter; unchanged if an exception is thrown.</param>
    /// <param name="folder">Holds <c>adapter_config.json</c> and <c>adapter_model.safetensors</c>.</param>
    /// <exception cref="FileNotFoundException">The folder lacks one of them.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, a tensor is missing, unknown or of another shape, or the model lacks a module that is adapted.</exception>
    /// <exception cref="NotSupportedException">A kind of adapter, or a setting, that this library does not compute.</exception>
    /// <exception cref="InvalidOperationException">The model carries an adapter already.</exception>
    public static void LoadAdapter(this CausalLM model, string folder)
    {
        var config = LoraConfig.FromPretrained(folder);
        using var file = SafetensorsReader.Open(Path.Combine(folder, WeightsName));
        List<Target> targets;
        try
        {
            targets = Targets(model, config);
        }
        catch (ArgumentException e)
        {
            throw new InvalidDataException($"'{folder}' does not fit this model: {e.Message}", e);
        }
        Check(file, targets, config, model, Path.Combine(folder, WeightsName));
        Attach(model, config, targets);
        foreach (var (key, parameter) in Parameters(model)) file.ReadInto(key, parameter);
    }

    /// <summary>Writes the adapter as PEFT does: both files whole or neither. The model itself is not written.</summary>
    /// <param name="model">With an adapter.</param>
    /// <param name="folder">Made where it does not exist.</param>
    /// <exception cref="InvalidOperationException">The model carries no adapter.</exception>
    public static void SaveAdapter(this CausalLM model, string folder)
    {
        var config = AdapterOf(model);
        Directory.CreateDirectory(folder);
        using var files = new PendingFiles();
        SafetensorsWriter.Write(files.Add(Path.Combine(folder, WeightsName)), Parameters(model).Select(p => (p.Key, (Tensor)p.Parameter)));
        files.Add(Path.Combine(folder, ConfigName)).Write(Encoding.UTF8.GetBytes(config.ToJson()));
        files.Commit();
    }

    /// <summary>W += s B A in every adapted module, computed in float32 or better. The model is then one without an adapter, and trained as a whole.</summary>
    /// <exception cref="InvalidOperationException">The model carries no adapter, or one on the embedding or the head where they are one matrix.</exception>
    public static void MergeAdapter(this CausalLM model)
    {
        foreach (var target in Mergeable(model)) target.Module.MergeAdapter();
        model.Adapter = null;
        foreach (var parameter in model.parameters()) parameter.requires_grad = true;
    }

    /// <summary>How to make each adapted weight as it would be merged, by the weight's name; the model is not changed.</summary>
    internal static Dictionary<string, Func<Tensor>> MergedWeights(CausalLM model) =>
        Mergeable(model).ToDictionary(t => t.Name + ".weight", t => (Func<Tensor>)t.Module.MergedWeight);

    private static List<Target> Mergeable(CausalLM model)
    {
        var targets = Targets(AdapterOf(model), model);
        if (model.Config.TieWordEmbeddings && targets.Find(t => t.Module is TokenEmbedding || t.Name == Head) is { } tied)
            throw new InvalidOperationException($"The adapter of '{tied.Name}' cannot be merged: embedding and LM head are one matrix in this model (tie_word_embeddings), and the adapter is for one of the two. Save the adapter instead (SaveAdapter).");
        return targets;
    }

    /// <summary>A module to adapt and the shapes of its A and B.</summary>
    private sealed record Target(string Name, IAdaptable Module, string Prefix, long[] A, long[] B)
    {
        public string Key(string matrix) => LoraExtensions.Key($"{Name}.{Prefix}{matrix}.weight");
    }

    private static LoraConfig AdapterOf(CausalLM model) => model.Adapter ?? throw new InvalidOperationException("The model carries no adapter.");

    private static List<Target> Targets(CausalLM model, LoraConfig config)
    {
        config.Validate();
        if (model.Adapter is not null) throw new InvalidOperationException("The model carries an adapter already. Merge it first (MergeAdapter).");
        if (model.Config.FusedProjections)
            throw new NotSupportedException("LoRA is not supported for model_type 'phi3', whose files have q, k and v in one matrix, and gate and up: an adapter of the parts has no name there. Train the whole model instead.");
        foreach (int layer in config.LayersToTransform ?? [])
            if (layer < 0 || layer >= model.Config.NumHiddenLayers) throw new ArgumentException($"layers_to_transform names layer {layer}; the model has {model.Config.NumHiddenLayers}, from 0 on.");
        var targets = Targets(config, model);
        foreach (string name in config.TargetModules)
            if (!targets.Exists(t => Matches(t.Name, name)))
                throw new ArgumentException($"target_modules names '{name}', and the model has no linear layer or embedding of that name (it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens and lm_head){(config.LayersToTransform is null ? "" : " in layers_to_transform")}.");
        return targets;
    }

    // In the order of the names: a module's number, and with it its mask, is then the same in every run.
    private static List<Target> Targets(LoraConfig config, CausalLM model) =>
        [.. Modules(model, "", []).Where(m => IsTarget(m.Name, config))
            .Select(m => TargetOf(m.Name, m.Module, config.R)).OfType<Target>().OrderBy(t => t.Name, StringComparer.Ordinal)];

    // Depth first, each module under its first name: TorchSharp registers private fields, too, under theirs.
    private static IEnumerable<(string Name, nn.Module Module)> Modules(nn.Module parent, string prefix, HashSet<nn.Module> seen) =>
        parent.named_children().Where(c => seen.Add(c.module)).SelectMany(c => Modules(c.module, $"{prefix}{c.name}.", seen).Prepend((prefix + c.name, c.module)));

    private static Target? TargetOf(string name, nn.Module module, long r) => module switch
    {
        Projection { Weight: var w } linear => new Target(name, linear, "lora_", [r, w.size(1)], [w.size(0), r]),
        TokenEmbedding { Weight: var e } embedding => new Target(name, embedding, "lora_embedding_", [r, e.size(0)], [e.size(1), r]),
        _ => null,
    };

    /// <summary>Whether a module gets an adapter, if it is one that can have one.</summary>
    internal static bool IsTarget(string module, LoraConfig config) => config.TargetModules.Any(t => Matches(module, t)) && IsTransformed(module, config);

    private static bool Matches(string module, string target) => module == target || module.EndsWith("." + target, StringComparison.Ordinal);

    private static bool IsTransformed(string name, LoraConfig config) =>
        config.LayersToTransform is not { } layers || layers.Any(l => name.Contains($".layers.{l}.", StringComparison.Ordinal));

    // All matrices first: if there is no memory for one, the model is as it was.
    private static void Attach(CausalLM model, LoraConfig config, List<Target> targets)
    {
        List<LoraAdapter> adapters = [.. targets.Select((t, i) => new LoraAdapter(New(model, t.A), New(model, t.B), config.Scaling, config.LoraDropout, i))];
        foreach (var parameter in model.parameters()) parameter.requires_grad = false;
        foreach (var (target, adapter) in targets.Zip(adapters)) target.Module.Adapter = adapter;
        model.Adapter = config;
    }

    private static Parameter New(CausalLM model, long[] shape) => new(zeros(shape, Gradients.AccumulationType(model.DType), model.Device));

    // As PEFT: beside a linear layer A is uniform in ±1/√in (Kaiming with a = √5) and B zero; beside an embedding A is zero and B normal.
    private static void Initialize(Target target)
    {
        using var noGrad = no_grad();
        double bound = 1 / Math.Sqrt(target.A[1]);
        if (target.Module is TokenEmbedding) target.Module.Adapter!.B.normal_();
        else target.Module.Adapter!.A.uniform_(-bound, bound);
    }

    /// <summary>A and B of every adapted module, under their names in PEFT's files.</summary>
    internal static IEnumerable<(string Key, Parameter Parameter)> Parameters(CausalLM model) =>
        model.named_parameters().Where(p => p.name.Contains(".lora_", StringComparison.Ordinal)).Select(p => (Key(p.name), p.parameter));

    // PEFT's name of a parameter in files. Beside an embedding A and B are no modules there.
    private static string Key(string name) =>
        KeyPrefix + (name.Contains(".lora_embedding_", StringComparison.Ordinal) ? name[..^".weight".Length] : name);

    private static void Check(SafetensorsReader file, List<Target> targets, LoraConfig config, CausalLM model, string path)
    {
        var expected = targets.SelectMany(t => new[] { (Key: t.Key("A"), Shape: t.A), (Key: t.Key("B"), Shape: t.B) }).ToDictionary(e => e.Key, e => e.Shape);
        foreach (var (key, shape) in expected)
        {
            if (!file.Contains(key)) throw new InvalidDataException($"'{path}' lacks the tensor '{key}', which {ConfigName} calls for.");
            if (!file.Shape(key).AsSpan().SequenceEqual(shape))
                throw new InvalidDataException($"'{path}': tensor '{key}' is [{string.Join(", ", file.Shape(key))}]; the model and r = {config.R} make it [{string.Join(", ", shape)}].");
        }
        foreach (string key in file.Names)
            if (!expected.ContainsKey(key) && !IsBaseWeight(file, key, model, path))
                throw new InvalidDataException($"'{path}' holds a tensor '{key}' that {ConfigName} has no place for in this model.");
    }

    // PEFT writes the weight below an adapted embedding or head, too. It may be there if it is the model's own.
    private static bool IsBaseWeight(SafetensorsReader file, string key, CausalLM model, string path)
    {
        if (!key.StartsWith(KeyPrefix, StringComparison.Ordinal) || !key.EndsWith(BaseLayer + ".weight", StringComparison.Ordinal)) return false;
        string name = key[KeyPrefix.Length..].Replace(BaseLayer, "", StringComparison.Ordinal);
        var own = name == Head + ".weight" ? model.Head.Weight : model.named_parameters().FirstOrDefault(p => p.name == name).parameter;
        if (own is null) return false;
        using var scope = NewDisposeScope();
        var stored = file.Read(key).to(own.dtype).to(own.device);
        if (stored.shape.AsSpan().SequenceEqual(own.shape) && stored.eq(own).all().item<bool>()) return true;
        throw new InvalidDataException($"'{path}': tensor '{key}' differs from the model's own weight: the adapter was made for another model.");
    }
}
