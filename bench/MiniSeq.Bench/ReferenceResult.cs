using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>How far a tensor is from the one wanted.</summary>
/// <param name="Max">max |got − want| / max |want|: one wrong entry shows.</param>
/// <param name="L2">‖got − want‖ / ‖want‖: what rounding does to the tensor as a whole.</param>
internal readonly record struct Difference(double Max, double L2)
{
    /// <summary>None where both are zero; infinite where only <paramref name="want"/> is, where a number is not finite, and where shapes differ.</summary>
    public static Difference Of(Tensor got, Tensor want)
    {
        if (!got.shape.AsSpan().SequenceEqual(want.shape)) return new(double.PositiveInfinity, double.PositiveInfinity);
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var wide = want.to(ScalarType.Float64);
        var off = got.to(ScalarType.Float64) - wide;
        return new(Ratio(off.abs().max(), wide.abs().max()), Ratio(off.norm(), wide.norm()));
    }

    /// <summary>The larger of each.</summary>
    public static Difference Worst(Difference a, Difference b) => new(Math.Max(a.Max, b.Max), Math.Max(a.L2, b.L2));

    private static double Ratio(Tensor off, Tensor size)
    {
        double o = off.item<double>(), s = size.item<double>();
        return o == 0 ? 0 : double.IsFinite(o / s) ? o / s : double.PositiveInfinity;
    }
}

/// <summary>A tensor by name and how far off it is.</summary>
internal sealed record NamedDifference(string Name, double Off);

/// <summary>One way to compute the step, and how far off it was.</summary>
/// <param name="Options">Chunk size and what is kept.</param>
/// <param name="Loss">|got − want| / |want|, the larger of training and evaluation.</param>
/// <param name="Gradients">Of each tensor of the checkpoint; none where the folder has no gradients.</param>
internal sealed record ReferenceRun(ComputeOptions Options, double Loss, IReadOnlyDictionary<string, Difference> Gradients)
{
    /// <summary>The largest of each measure over all gradients; null where there are none.</summary>
    public Difference? Worst => Gradients.Count == 0 ? null : Gradients.Values.Aggregate(Difference.Worst);
}

/// <summary>Greedy continuation.</summary>
/// <param name="Equal">Leading tokens that are the wanted ones.</param>
/// <param name="Wanted">Tokens in all.</param>
/// <param name="Margin">By how much the wanted logits prefer the first token that was missed; null where none was, or where the folder does not say.</param>
internal sealed record GreedyResult(int Equal, int Wanted, double? Margin);

/// <summary>What is computed without training.</summary>
/// <param name="Logits">Of the logits.</param>
/// <param name="LogitsAbsolute">Largest |got − want| of the logits, in their own unit.</param>
/// <param name="Greedy">The continuation.</param>
internal sealed record ReferenceInference(Difference Logits, double LogitsAbsolute, GreedyResult Greedy);

/// <summary>What a model gave against what its folder wants.</summary>
internal sealed record ReferenceResult
{
    /// <summary><c>model_type</c>.</summary>
    public required string Architecture { get; init; }

    /// <summary>Decoder layers.</summary>
    public required int Layers { get; init; }

    /// <summary>Logits and continuation.</summary>
    public required ReferenceInference Inference { get; init; }

    /// <summary>The same with the adapter merged into the weights; null where there is none.</summary>
    public ReferenceInference? Merged { get; init; }

    /// <summary>Every way to compute the step.</summary>
    public required IReadOnlyList<ReferenceRun> Runs { get; init; }

    /// <summary>Rounding in what is wanted; null where the folder does not say.</summary>
    public ReferenceNoise? Noise { get; init; }

    /// <summary>Of the logits, the merged model's among them.</summary>
    public Difference Logits => Merged is null ? Inference.Logits : Difference.Worst(Inference.Logits, Merged.Logits);

    /// <summary>The worst of the runs.</summary>
    public double Loss => Runs.Max(r => r.Loss);

    /// <summary>Each gradient in the worst of the runs for it.</summary>
    public IReadOnlyDictionary<string, Difference> Gradients => Runs.SelectMany(r => r.Gradients).GroupBy(g => g.Key)
        .ToDictionary(g => g.Key, g => g.Select(d => d.Value).Aggregate(Difference.Worst));

    /// <summary>The gradient with the largest of a measure; null where there are none.</summary>
    public NamedDifference? WorstGradient(Func<Difference, double> measure) =>
        Gradients.Select(g => new NamedDifference(g.Key, measure(g.Value))).MaxBy(g => g.Off);
}

/// <summary>How far off is too far.</summary>
/// <param name="Tolerance">Of every tensor.</param>
/// <param name="Entrywise">Whether <see cref="Difference.Max"/> is held to it too. Not in bfloat16: the largest of thousands of roundings of 0.4 % is
/// luck, their norm is not.</param>
/// <param name="NearTies">Whether the continuation may part where the wanted logits prefer a token by less than the logits are off anyway, or where
/// the folder does not say by how much.</param>
internal sealed record ReferenceBounds(double Tolerance, bool Entrywise, bool NearTies)
{
    /// <summary>The bounds of a type of computation. In float32, measured and in the files' own noise, logits and gradients are off by 1e-6 to 1e-5;
    /// in bfloat16, measured, logits by 0.03 and gradients by up to 0.08 in L2, Gemma 2's of q and k by 0.16: that finds what only bfloat16 breaks, and small faults only float32 finds.</summary>
    public static ReferenceBounds Of(ScalarType dtype, double? tolerance = null) => dtype switch
    {
        ScalarType.BFloat16 => new(tolerance ?? 0.25, Entrywise: false, NearTies: true),
        _ => new(tolerance ?? 1e-4, Entrywise: true, NearTies: false),
    };

    /// <summary>What is beyond the bounds, in words; empty where nothing is.</summary>
    public IReadOnlyList<string> Faults(ReferenceResult result)
    {
        List<string> faults = [];
        faults.AddRange(Faults(result.Inference, ""));
        if (!(result.Loss <= Tolerance)) faults.Add("loss");
        faults.AddRange(result.Gradients.Where(g => !Holds(g.Value)).Select(g => $"gradient of {g.Key}"));
        if (result.Merged is { } merged) faults.AddRange(Faults(merged, " of the merged model"));
        return faults;
    }

    private IEnumerable<string> Faults(ReferenceInference inference, string of)
    {
        if (!Holds(inference.Logits)) yield return "logits" + of;
        if (!Holds(inference.Greedy, inference.LogitsAbsolute)) yield return "greedy ids" + of;
    }

    private bool Holds(Difference d) => d.L2 <= Tolerance && (!Entrywise || d.Max <= Tolerance);

    // Two logits move, so a lead of twice the distance may be lost.
    private bool Holds(GreedyResult greedy, double logitsAbsolute) =>
        greedy.Equal == greedy.Wanted || (NearTies && (greedy.Margin ?? 0) <= 2 * logitsAbsolute);
}
