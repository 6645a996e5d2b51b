using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Training;

/// <summary>
/// AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in place and without temporaries, where TorchSharp's own holds two a parameter until
/// the step ends: on the CPU in one pass over each parameter's memory, elsewhere through libtorch's fused operator.
/// </summary>
/// <remarks>
/// Moments are float32 (or wider, as the parameters), or bfloat16 (<see cref="TrainingOptions.OptimizerState"/>). A 16-bit parameter gets a
/// float32 master copy, from which it is rounded in each step. Matrices decay, norms and biases do not.
/// </remarks>
public sealed class FusedAdamW : IDisposable
{
    private readonly AdamWState[] _states;
    private readonly Dictionary<Parameter, AdamWState> _of;
    private readonly TrainingOptions _options;

    /// <summary>An optimizer of the parameters that require a gradient.</summary>
    public FusedAdamW(IEnumerable<Parameter> parameters, TrainingOptions options)
    {
        _states = [.. parameters.Where(p => p.requires_grad).Select((p, i) => new AdamWState(p, i, options.OptimizerState))];
        _of = new Dictionary<Parameter, AdamWState>(_states.Select(s => KeyValuePair.Create(s.Parameter, s)), ReferenceEqualityComparer.Instance);
        _options = options;
        if (_states.Length == 0) throw new ArgumentException("No parameter is trained: all of them are frozen.", nameof(parameters));
    }

    /// <summary>Bytes of the optimizer's state as it stands, master copies included: it is made at a parameter's first step.</summary>
    public long StateBytes => _states.Sum(s => s.Bytes);

    /// <summary>The L2 norm of all gradients together. Above <paramref name="maxNorm"/> (if that is not 0) they are scaled down to it.</summary>
    public double ClipGradNorm(double maxNorm)
    {
        using var noGrad = no_grad();
        double norm = GradNorm(_states.Select(s => s.Parameter));
        if (maxNorm > 0 && norm > maxNorm)
            foreach (var s in _states)
            {
                using var g = s.Parameter.grad;
                g?.mul_(maxNorm / norm);
            }
        return norm;
    }

    /// <summary>The L2 norm of the gradients of some parameters together; 0 where there is none.</summary>
    public static double GradNorm(IEnumerable<Parameter> parameters)
    {
        using var noGrad = no_grad();
        using var scope = NewDisposeScope();
        Tensor[] norms = [.. parameters.Select(p => p.grad).OfType<Tensor>().Select(g => g.norm().to(ScalarType.Float64))];
        return norms.Length == 0 ? 0 : stack(norms).norm().item<double>();
    }

    /// <summary>One update of every parameter that has a gradient.</summary>
    public void Step(double learningRate) => Update(_states, learningRate);

    /// <summary>The same for some of the parameters, whose gradients are then freed. Those that are not this optimizer's are left alone.</summary>
    public void StepAndFree(IReadOnlyList<Parameter> parameters, double learningRate)
    {
        AdamWState[] states = [.. parameters.Select(p => _of.GetValueOrDefault(p)).OfType<AdamWState>()];
        Update(states, learningRate);
        foreach (var s in states) s.Parameter.grad = null;
    }

    /// <summary>Frees every gradient.</summary>
    public void ZeroGrad()
    {
        foreach (var s in _states) s.Parameter.grad = null;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (var s in _states) s.Dispose();
    }

    private void Update(IEnumerable<AdamWState> states, double learningRate)
    {
        using var noGrad = no_grad();
        using var scope = NewDisposeScope();
        var numbers = new AdamWNumbers(learningRate, _options);
        AdamWState[] due = [.. states.Where(s => s.HasGradient)];
        foreach (var s in due) s.BeginStep();
        foreach (var s in due.Where(AdamWKernel.Fits))
        {
            using var one = NewDisposeScope(); // a gradient that had to be converted
            AdamWKernel.Update(s, numbers);
        }
        AdamWOperator.Update(due.Where(s => !AdamWKernel.Fits(s)), numbers);
    }
}
