using System.Text;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Models from and to Hugging Face folders: <c>config.json</c> and <c>model.safetensors</c>, whole or in shards.</summary>
public static class Checkpoint
{
    /// <summary>Loads a model tensor by tensor: memory is the model once and one tensor more.</summary>
    /// <param name="folder">A Hugging Face checkpoint.</param>
    /// <param name="dtype">Type of the weights in memory; null keeps that of the file (float16 becomes float32: the CPU computes in it slowly).</param>
    /// <param name="device">Where the weights go; null is the CPU.</param>
    /// <param name="progress">Told (tensors loaded, tensors in all).</param>
    /// <exception cref="FileNotFoundException">The folder lacks config.json or weights.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, or a tensor is missing, unknown or of another shape; nothing is allocated before that is checked.</exception>
    /// <exception cref="NotSupportedException">The architecture is not supported.</exception>
    public static CausalLM LoadPretrained(string folder, ScalarType? dtype = null, Device? device = null, IProgress<(int Done, int Total)>? progress = null)
    {
        var config = DecoderConfig.FromPretrained(folder);
        using var file = SafetensorsReader.Open(folder);
        Dictionary<string, long[]> expected;
        using (var shapes = new CausalLM(config, ScalarType.Float32, META, initialize: false))
            expected = shapes.named_parameters().ToDictionary(p => p.name, p => p.parameter.shape);
        Check(file, expected, config, folder);
        var model = new CausalLM(config, dtype ?? Computable(file.DType("model.embed_tokens.weight")), device, initialize: false);
        try
        {
            int done = 0;
            foreach (var (name, parameter) in model.named_parameters())
            {
                file.ReadInto(name, parameter);
                progress?.Report((++done, expected.Count));
            }
            return model;
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    /// <summary>Writes <c>config.json</c> and <c>model.safetensors</c>: each whole or not at all.</summary>
    /// <param name="model">Its weights are written as they are.</param>
    /// <param name="folder">Made where it does not exist.</param>
    /// <param name="maxShardBytes">Weights above it are split into several files.</param>
    /// <exception cref="InvalidOperationException">The model carries an adapter that is not merged.</exception>
    public static void SavePretrained(this CausalLM model, string folder, long maxShardBytes = 5_000_000_000)
    {
        if (model.Adapter is not null) throw new InvalidOperationException("The model carries a LoRA adapter. Save that alone (SaveAdapter), or merge it into the weights first (MergeAdapter).");
        Directory.CreateDirectory(folder);
        SafetensorsWriter.SavePretrained(folder, [.. model.named_parameters().Select(p => (p.name, (Tensor)p.parameter))], maxShardBytes);
        using var files = new PendingFiles();
        files.Add(Path.Combine(folder, "config.json")).Write(Encoding.UTF8.GetBytes(model.Config.ToJson(model.DType)));
        files.Commit();
    }

    private static ScalarType Computable(ScalarType stored) => stored == ScalarType.Float16 ? ScalarType.Float32 : stored;

    private static void Check(SafetensorsReader file, Dictionary<string, long[]> expected, DecoderConfig config, string folder)
    {
        foreach (var (name, shape) in expected)
        {
            if (!file.Contains(name)) throw new InvalidDataException($"'{folder}': the weights lack the tensor '{name}', which config.json calls for.");
            if (!file.Shape(name).AsSpan().SequenceEqual(shape))
                throw new InvalidDataException($"'{folder}': tensor '{name}' is [{string.Join(", ", file.Shape(name))}] in the weights, and config.json makes it [{string.Join(", ", shape)}].");
        }
        foreach (var name in file.Names)
        {
            bool known = expected.ContainsKey(name) || (config.TieWordEmbeddings && name == "lm_head.weight") || name.EndsWith(".rotary_emb.inv_freq", StringComparison.Ordinal);
            if (!known) throw new InvalidDataException($"'{folder}': the weights hold a tensor '{name}' that this model has no place for; config.json may be another model's.");
        }
    }
}
