using MiniSeq.Models;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>A checkpoint with the logits, loss, gradients and greedy text that another implementation computed from it.</summary>
internal sealed class ReferenceFolder : IDisposable
{
    private readonly string _folder;
    private readonly ReferenceNumbers _want;

    private ReferenceFolder(string folder, CausalLM model, ReferenceNumbers want) => (_folder, Model, _want) = (folder, model, want);

    /// <summary>The checkpoint's model, with the adapter where the folder is one's.</summary>
    public CausalLM Model { get; }

    /// <summary>Whether a folder holds a checkpoint, and is not a folder of folders.</summary>
    public static bool IsModel(string folder) => File.Exists(Path.Combine(folder, "config.json"));

    /// <summary>Whether a folder holds an adapter for the checkpoint in the folder above, with numbers.</summary>
    public static bool IsAdapter(string folder) => File.Exists(Path.Combine(folder, "expected_adapter.safetensors"));

    /// <summary>What a folder is called in the table.</summary>
    public static string NameOf(string folder)
    {
        string full = Full(folder);
        return IsAdapter(full) ? $"{Path.GetFileName(Path.GetDirectoryName(full))} + {Path.GetFileName(full)}" : Path.GetFileName(full);
    }

    /// <summary>Loads the model and the numbers.</summary>
    /// <param name="folder">config.json, weights, expected.safetensors and expected.json; or an adapter with expected_adapter.* below such a folder.</param>
    /// <param name="dtype">The computation's, whatever the weights'; null is that of the numbers (<see cref="ReferenceNumbers.ComputedIn"/>).</param>
    /// <exception cref="IOException">A file is missing.</exception>
    /// <exception cref="InvalidDataException">A file is damaged, or names and shapes do not fit together.</exception>
    /// <exception cref="NotSupportedException">The architecture is not supported.</exception>
    public static ReferenceFolder Open(string folder, ScalarType? dtype = null)
    {
        string full = Full(folder);
        var model = Load(full, dtype);
        try
        {
            var opened = new ReferenceFolder(full, model, model.Adapter is null ? ReferenceNumbers.Read(full) : ReferenceNumbers.ReadAdapter(full));
            opened.CheckNames();
            return opened;
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    private static string Full(string folder) => Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));

    // With the adapter, where the folder is one's.
    private static CausalLM Load(string folder, ScalarType? dtype)
    {
        string checkpoint = IsAdapter(folder) ? Path.GetDirectoryName(folder)! : folder;
        var model = Checkpoint.LoadPretrained(checkpoint, dtype ?? ReferenceNumbers.ComputedIn(checkpoint));
        try
        {
            if (checkpoint != folder) model.LoadAdapter(folder);
            return model;
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    /// <summary>The gradients that are in place, by the names of the checkpoint, or of the adapter where there is one. The caller disposes them.</summary>
    public static Dictionary<string, Tensor> Gradients(CausalLM model)
    {
        using var noGrad = no_grad();
        return Trained(model).ToDictionary(t => t.Name, t => cat([.. t.Parts.Select(p => p.grad ?? zeros_like(p))]));
    }

    private static IEnumerable<(string Name, IReadOnlyList<Parameter> Parts)> Trained(CausalLM model) =>
        model.Adapter is null ? model.CheckpointTensors() : LoraExtensions.Parameters(model).Select(p => (p.Key, (IReadOnlyList<Parameter>)[p.Parameter]));

    /// <summary>Computes everything and compares it.</summary>
    /// <param name="options">The ways to compute the step.</param>
    public ReferenceResult Check(IEnumerable<ComputeOptions> options)
    {
        return new ReferenceResult
        {
            Architecture = Model.Config.ModelType,
            Layers = Model.Config.NumHiddenLayers,
            Inference = Infer(Model, _want.NewTokens),
            Merged = Model.Adapter is null ? null : Merged(),
            Runs = [.. options.Select(Step)],
            Noise = _want.Noise,
        };
    }

    // A model of its own: a merge cannot be undone.
    private ReferenceInference Merged()
    {
        using var model = Load(_folder, Model.DType);
        model.MergeAdapter();
        return Infer(model, _want.MergedNewTokens ?? _want.NewTokens);
    }

    private ReferenceInference Infer(CausalLM model, int[] newTokens)
    {
        using var scope = NewDisposeScope();
        var logits = model.call(_want.InputIds);
        if (_want.Positions is { } positions) logits = logits.index_select(1, tensor(positions));
        var off = Difference.Of(logits, _want.Logits);
        double absolute = off.Max * _want.Logits.abs().max().to(ScalarType.Float64).item<double>();
        return new ReferenceInference(off, absolute, Greedy(model, newTokens));
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

    private GreedyResult Greedy(CausalLM model, int[] want)
    {
        int[] got = model.Generate([_want.Prompt], new GenerationOptions { MaxNewTokens = want.Length, EosTokenIds = [] })[0];
        int equal = want.Zip(got).TakeWhile(p => p.First == p.Second).Count();
        return new GreedyResult(equal, want.Length, equal < want.Length ? _want.Margins?[equal] : null);
    }

    private void CheckNames()
    {
        if (_want.Gradients is not { } want) return;
        string file = Model.Adapter is null ? "expected.safetensors" : "expected_adapter.safetensors";
        var names = Trained(Model).Select(t => t.Name).ToHashSet();
        if (names.Except(want.Keys).FirstOrDefault() is { } missing) throw new InvalidDataException($"'{_folder}': {file} has no gradient of '{missing}'.");
        if (want.Keys.Except(names).FirstOrDefault() is { } unknown) throw new InvalidDataException($"'{_folder}': {file} has a gradient of '{unknown}', which the model does not have.");
    }

    public void Dispose()
    {
        Model.Dispose();
        _want.Dispose();
    }
}
