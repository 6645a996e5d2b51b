using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>A checkpoint with the logits, loss, gradients and greedy text that another implementation computed from it.</summary>
internal sealed class ReferenceFolder : IDisposable
{
    private readonly string _name;
    private readonly ReferenceNumbers _want;

    private ReferenceFolder(string name, CausalLM model, ReferenceNumbers want) => (_name, Model, _want) = (name, model, want);

    /// <summary>The checkpoint's model.</summary>
    public CausalLM Model { get; }

    /// <summary>Whether a folder holds a checkpoint, and is not a folder of folders.</summary>
    public static bool IsModel(string folder) => File.Exists(Path.Combine(folder, "config.json"));

    /// <summary>Whether a folder holds an adapter for the checkpoint in the folder above, with numbers.</summary>
    public static bool IsAdapter(string folder) => File.Exists(Path.Combine(folder, "adapter_config.json")) && File.Exists(Path.Combine(folder, "expected_adapter.safetensors"));

    /// <summary>Loads the model and the numbers.</summary>
    /// <param name="folder">config.json, weights, expected.safetensors and expected.json; or an adapter with expected_adapter.* below such a folder.</param>
    /// <param name="dtype">The computation's, whatever the file's: rounding of the computation is then not taken for a fault of the formula.</param>
    /// <exception cref="IOException">A file is missing.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, or names and shapes do not fit together.</exception>
    /// <exception cref="NotSupportedException">The architecture is not supported.</exception>
    public static ReferenceFolder Open(string folder, ScalarType dtype = ScalarType.Float32)
    {
        string full = Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));
        string? below = IsAdapter(full) ? Path.GetDirectoryName(full)! : null;
        var model = Checkpoint.LoadPretrained(below ?? full, dtype);
        try
        {
            if (below is not null) model.LoadAdapter(full);
            var opened = new ReferenceFolder(NameOf(full), model, below is null ? ReferenceNumbers.Read(full) : ReferenceNumbers.ReadAdapter(full));
            opened.CheckNames(folder);
            return opened;
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    /// <summary>What a folder is called in the table.</summary>
    public static string NameOf(string folder)
    {
        string full = Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));
        return IsAdapter(full) ? $"{Path.GetFileName(Path.GetDirectoryName(full))} with LoRA" : Path.GetFileName(full);
    }

    /// <summary>The gradients that are in place, by the names of the checkpoint, or of the adapter where there is one. The caller disposes them.</summary>
    public static Dictionary<string, Tensor> Gradients(CausalLM model)
    {
        using var noGrad = no_grad();
        return Trained(model).ToDictionary(t => t.Name, t => cat([.. t.Parts.Select(p => p.grad ?? zeros_like(p))]));
    }

    private static IEnumerable<(string Name, IReadOnlyList<Tensor> Parts)> Trained(CausalLM model) => model.Adapter is null
        ? model.CheckpointTensors().Select(t => (t.Name, (IReadOnlyList<Tensor>)t.Parts))
        : LoraExtensions.Parameters(model).Select(p => (p.Key, (IReadOnlyList<Tensor>)[p.Parameter]));

    /// <summary>Computes everything and compares it.</summary>
    /// <param name="options">The ways to compute the step.</param>
    public ReferenceResult Check(IEnumerable<ComputeOptions> options)
    {
        using var scope = NewDisposeScope();
        var logits = Model.call(_want.InputIds);
        if (_want.Positions is { } positions) logits = logits.index_select(1, tensor(positions));
        var off = Difference.Of(logits, _want.Logits);
        return new ReferenceResult
        {
            Model = _name,
            Architecture = Model.Config.ModelType,
            Layers = Model.Config.NumHiddenLayers,
            Logits = off,
            LogitsAbsolute = off.Max * _want.Logits.abs().max().to(ScalarType.Float64).item<double>(),
            Runs = [.. options.Select(Step)],
            Greedy = Greedy(),
            Noise = _want.Noise,
        };
    }

    private ReferenceRun Step(ComputeOptions options)
    {
        using var scope = NewDisposeScope();
        foreach (var p in Model.parameters()) p.grad = null;
        using var batch = _want.Batch();
        using var loss = Model.ForwardBackward(batch, 1.0 / batch.TargetCount, options);
        var score = Model.Evaluate(batch, options);
        double off = Math.Max(Off(loss.Mean), Off(score.LossSum / score.TargetCount));
        var gradients = _want.Gradients is { } want ? Gradients(Model).ToDictionary(g => g.Key, g => Difference.Of(g.Value, want[g.Key])) : [];
        return new ReferenceRun(options, off, gradients);
    }

    private double Off(double loss)
    {
        double off = Math.Abs(loss - _want.Loss) / Math.Abs(_want.Loss);
        return double.IsNaN(off) ? double.PositiveInfinity : off;
    }

    private GreedyResult Greedy()
    {
        int[] want = _want.NewTokens;
        int[] got = Model.Generate([_want.Prompt], new GenerationOptions { MaxNewTokens = want.Length, EosTokenIds = [] })[0];
        int equal = want.Zip(got).TakeWhile(p => p.First == p.Second).Count();
        return new GreedyResult(equal, want.Length, equal < want.Length ? _want.Margins?[equal] : null);
    }

    private void CheckNames(string folder)
    {
        if (_want.Gradients is not { } want) return;
        var names = Trained(Model).Select(t => t.Name).ToHashSet();
        if (names.Except(want.Keys).FirstOrDefault() is { } missing) throw new InvalidDataException($"'{folder}': expected.safetensors has no gradient of '{missing}'.");
        if (want.Keys.Except(names).FirstOrDefault() is { } unknown) throw new InvalidDataException($"'{folder}': expected.safetensors has a gradient of '{unknown}', which the model does not have.");
    }

    public void Dispose()
    {
        Model.Dispose();
        _want.Dispose();
    }
}
