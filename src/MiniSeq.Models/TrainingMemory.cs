using MiniSeq.Layers;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>How long gradients live.</summary>
public enum GradientLifetime
{
    /// <summary>Made by backward, from the head's to the embedding's, and freed after the update: a step of one micro-batch.</summary>
    Step,

    /// <summary>Through the whole step: those of all parameters are there before the last micro-batch begins.</summary>
    Accumulated,

    /// <summary>Freed as soon as their module is updated, in backward: those of one module exist at a time.</summary>
    Module,
}

/// <summary>What a training run keeps beside a step's activations: weights, gradients, optimizer state.</summary>
/// <remarks>Frozen weights other than those under an adapter are counted as trained.</remarks>
public sealed record TrainingMemory
{
    /// <summary>The adapter that is trained in place of the weights; null trains all of them.</summary>
    public LoraConfig? Adapter { get; init; }

    /// <summary>Type of AdamW's two moments: float32, float64 beside float64 weights, or bfloat16.</summary>
    public ScalarType Moments { get; init; } = ScalarType.Float32;

    /// <summary>Whether 16-bit parameters have a float32 copy that the optimizer updates. Always so in this library; without one, a run is that of arXiv 2407.15892.</summary>
    public bool MasterCopy { get; init; } = true;

    /// <summary>How long gradients live.</summary>
    public GradientLifetime GradientLifetime { get; init; }

    // Adapters are float32 beside 16-bit weights.
    internal long WeightBytes(ParameterCounts p) => (p.Weights * p.DType.ElementSize()) + (p.Adapters * Wide(p));

    internal long OptimizerBytes(ParameterCounts p)
    {
        long moment = Moments == ScalarType.BFloat16 ? Moments.ElementSize() : Wide(p);
        long master = MasterCopy && !p.IsAdapted && p.DType.ElementSize() < Wide(p) ? Wide(p) : 0;
        return Enumerable.Range(0, p.Head + 1).Sum(p.Trained) * ((2 * moment) + master);
    }

    internal long TotalBytes(ParameterCounts p, IEnumerable<StepStage> stages, long gradientElement) =>
        WeightBytes(p) + OptimizerBytes(p) + stages.Max(s => s.Bytes + (Alive(p, s.Module) * gradientElement));

    // Trained parameters that have a gradient while a module's are made; none before the head's.
    private long Alive(ParameterCounts p, int module) => GradientLifetime switch
    {
        GradientLifetime.Accumulated => Sum(p, 0),
        _ when module > p.Head => 0,
        GradientLifetime.Step => Sum(p, module) + TiedHead(p, module),
        _ => p.Trained(module) + TiedHead(p, module),
    };

    private static long Sum(ParameterCounts p, int first) => Enumerable.Range(first, p.Head + 1 - first).Sum(p.Trained);

    // The head makes the embedding's gradient, which is complete only at the end.
    private static long TiedHead(ParameterCounts p, int module) => p.Tied && !p.IsAdapted && module > 0 ? p.Vocabulary : 0;

    private static long Wide(ParameterCounts p) => Gradients.AccumulationType(p.DType).ElementSize();
}

/// <summary>A part of a step: while the gradients of a module are made (<see cref="ParameterCounts"/> has the numbers), so many bytes are held beside weights, gradients and optimizer state.</summary>
internal readonly record struct StepStage(int Module, long Bytes);
