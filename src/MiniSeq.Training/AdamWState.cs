using MiniSeq.Layers;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Training;

/// <summary>What AdamW keeps of one parameter: its moments and, of a 16-bit parameter, a float32 master copy (of one whose rows are not in order, a copy
/// whose rows are). Made at the first step.</summary>
/// <param name="parameter">Trained.</param>
/// <param name="index">Its number among the optimizer's parameters.</param>
/// <param name="type">Of the moments.</param>
internal sealed class AdamWState(Parameter parameter, int index, OptimizerStateType type) : IDisposable
{
    private Tensor? _master;
    private Tensor? _first;
    private Tensor? _second;

    public Parameter Parameter { get; } = parameter;

    public int Index { get; } = index;

    /// <summary>Weight decay is for matrices.</summary>
    public bool Decays { get; } = parameter.dim() >= 2;

    /// <summary>The parameter, in float32 or better.</summary>
    public Tensor Master => _master ?? Parameter;

    public bool HasMaster => _master is not null;

    public Tensor First => _first ?? throw new InvalidOperationException("No step was made.");

    public Tensor Second => _second ?? throw new InvalidOperationException("No step was made.");

    /// <summary>Whether the moments are bfloat16.</summary>
    public bool Narrow { get; } = type == OptimizerStateType.BFloat16;

    /// <summary>Steps begun.</summary>
    public int Steps { get; private set; }

    public long Bytes => new[] { _master, _first, _second }.OfType<Tensor>().Sum(t => t.numel() * t.element_size());

    public bool HasGradient
    {
        get
        {
            using var g = Parameter.grad;
            return g is not null;
        }
    }

    /// <summary>The gradient in the type and layout of the master; belongs to the scope.</summary>
    public Tensor Gradient => Parameter.grad!.to(Master.dtype).contiguous();

    /// <summary>Makes what is not there yet, and counts.</summary>
    public void BeginStep()
    {
        Steps++;
        if (_first is not null) return;
        var wide = Gradients.AccumulationType(Parameter.dtype);
        if (wide != Parameter.dtype || !Parameter.is_contiguous()) _master = Parameter.detach().to(wide).contiguous().DetachFromDisposeScope();
        Tensor Zeros() => zeros(Parameter.shape, Narrow ? ScalarType.BFloat16 : wide, Parameter.device).DetachFromDisposeScope();
        (_first, _second) = (Zeros(), Zeros());
    }

    public void Dispose()
    {
        foreach (var t in new[] { _master, _first, _second }) t?.Dispose();
    }
}

/// <summary>The numbers of one step.</summary>
/// <param name="LearningRate">η.</param>
/// <param name="Beta1">β₁.</param>
/// <param name="Beta2">β₂.</param>
/// <param name="Epsilon">ε.</param>
/// <param name="WeightDecay">λ, of matrices.</param>
/// <param name="Seed">Of stochastic rounding.</param>
internal readonly record struct AdamWNumbers(double LearningRate, double Beta1, double Beta2, double Epsilon, double WeightDecay, int Seed)
{
    public AdamWNumbers(double learningRate, TrainingOptions o) : this(learningRate, o.AdamBeta1, o.AdamBeta2, o.AdamEpsilon, o.WeightDecay, o.Seed)
    {
    }
}
