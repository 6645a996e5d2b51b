using System.Text;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Models from and to Hugging Face folders: <c>config.json</c> and <c>model.safetensors</c>, whole or in shards.</summary>
public static class Checkpoint
{
    private const string Embedding = "model.embed_tokens.weight";

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
            expected = shapes.CheckpointTensors().ToDictionary(t => t.Name, t => ShapeOf(t.Parts));
        Check(file, expected, config, folder);
        var model = new CausalLM(config, dtype ?? Computable(file.DType(Embedding)), device, initialize: false);
        try
        {
            int done = 0;
            foreach (var (name, parts) in model.CheckpointTensors())
            {
                Read(file, name, parts);
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

    /// <summary>The type in which a checkpoint's weights are stored.</summary>
    /// <param name="folder">A Hugging Face checkpoint.</param>
    /// <exception cref="FileNotFoundException">The folder lacks weights.</exception>
    /// <exception cref="InvalidDataException">They are damaged, or have no embedding.</exception>
    public static ScalarType StoredType(string folder)
    {
        using var file = SafetensorsReader.Open(folder);
        return file.Contains(Embedding) ? file.DType(Embedding) : throw Lacking(folder, Embedding);
    }

    /// <summary>Writes <c>config.json</c> and <c>model.safetensors</c>: each whole or not at all.</summary>
    /// <param name="model">Its weights are written as they are.</param>
    /// <param name="folder">Made where it does not exist.</param>
    /// <param name="maxShardBytes">Weights above it are split into several files.</param>
    /// <param name="mergeAdapter">Whether the weights are written with the adapter merged into them, one at a time; the model keeps its adapter.</param>
    /// <exception cref="InvalidOperationException">The model carries an adapter, and it is not to be merged or cannot be; or the folder holds an adapter,
    /// which other programs would add to the weights.</exception>
    /// <exception cref="NotSupportedException">Models of this family do not have one of the configuration's settings.</exception>
    public static void SavePretrained(this CausalLM model, string folder, long maxShardBytes = 5_000_000_000, bool mergeAdapter = false)
    {
        if (model.Adapter is not null && !mergeAdapter) throw new InvalidOperationException("The model carries a LoRA adapter. Save that alone (SaveAdapter), or merge it into the weights (MergeAdapter, or mergeAdapter: true).");
        string config = model.Config.ToJson(model.parameters().First().dtype); // its own, where it was converted since
        if (LoraExtensions.IsAdapter(folder)) throw new InvalidOperationException($"'{folder}' holds a LoRA adapter, which other programs would add to the weights written there. Choose another folder.");
        var merged = model.Adapter is null ? [] : LoraExtensions.MergedWeights(model);
        Directory.CreateDirectory(folder);
        SafetensorsWriter.SavePretrained(folder, model.CheckpointTensors().Select(t =>
            new TensorSource(t.Name, ShapeOf(t.Parts), t.Parts[0].dtype, merged.TryGetValue(t.Name, out var merge) ? merge : () => t.Parts.Count == 1 ? t.Parts[0] : cat([.. t.Parts]))), maxShardBytes);
        using var files = new PendingFiles();
        files.Add(Path.Combine(folder, "config.json")).Write(Encoding.UTF8.GetBytes(config));
        files.Commit();
    }

    private static long[] ShapeOf(IReadOnlyList<Tensor> parts) => [parts.Sum(p => p.size(0)), .. parts[0].shape[1..]];

    private static void Read(SafetensorsReader file, string name, IReadOnlyList<Tensor> parts)
    {
        if (parts.Count == 1)
        {
            file.ReadInto(name, parts[0]);
            return;
        }
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var whole = file.Read(name);
        long start = 0;
        foreach (var part in parts)
        {
            part.copy_(whole.narrow(0, start, part.size(0)));
            start += part.size(0);
        }
    }

    private static ScalarType Computable(ScalarType stored) => stored == ScalarType.Float16 ? ScalarType.Float32 : stored;

    private static void Check(SafetensorsReader file, Dictionary<string, long[]> expected, DecoderConfig config, string folder)
    {
        foreach (var (name, shape) in expected)
        {
            if (!file.Contains(name)) throw Lacking(folder, name);
            if (file.DType(name) is not (ScalarType.Float16 or ScalarType.BFloat16 or ScalarType.Float32 or ScalarType.Float64))
                throw new NotSupportedException($"'{folder}': tensor '{name}' is stored as {file.DType(name)}: quantized weights are not supported; use the unquantized checkpoint.");
            if (!file.Shape(name).AsSpan().SequenceEqual(shape))
                throw new InvalidDataException($"'{folder}': tensor '{name}' is [{string.Join(", ", file.Shape(name))}] in the weights, and config.json makes it [{string.Join(", ", shape)}].");
        }
        foreach (var name in file.Names)
        {
            bool known = expected.ContainsKey(name) || (config.TieWordEmbeddings && name == "lm_head.weight") || name.EndsWith(".rotary_emb.inv_freq", StringComparison.Ordinal);
            if (!known) throw new InvalidDataException($"'{folder}': the weights hold a tensor '{name}' that this model has no place for; config.json may be another model's.");
        }
    }

    private static InvalidDataException Lacking(string folder, string name) => new($"'{folder}': the weights lack the tensor '{name}', which config.json calls for.");
}
