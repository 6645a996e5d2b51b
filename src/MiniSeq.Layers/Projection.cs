using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// A linear layer y = x Wᵀ + b as a forward/backward pair, so that mini-sequence layers can drive its gradients a chunk at a time.
/// Parameters are named as in <c>torch.nn.Linear</c>: <c>weight</c> [out, in] and, where there is one, <c>bias</c> [out].
/// </summary>
/// <remarks>Calling it like any module records an ordinary autograd graph.</remarks>
public sealed class Projection : nn.Module<Tensor, Tensor>
{
    private readonly Parameter _weight;
    private readonly Parameter? _bias;

    /// <summary>Weights uniform in ±1/√in, as <c>torch.nn.Linear</c> draws them.</summary>
    public Projection(long inFeatures, long outFeatures, bool bias = false, ScalarType dtype = ScalarType.Float32, Device? device = null)
        : this(InitialWeight(inFeatures, outFeatures, dtype, device), bias ? new Parameter(zeros(outFeatures, dtype, device)) : null)
    {
    }

    /// <summary>A projection over existing parameters, shared and not copied (tied embeddings).</summary>
    public Projection(Parameter weight, Parameter? bias = null) : base(nameof(Projection))
    {
        (_weight, _bias) = (weight, bias);
        register_parameter("weight", _weight);
        if (_bias is not null) register_parameter("bias", _bias);
    }

    /// <summary>[out, in].</summary>
    public Parameter Weight => _weight;

    /// <summary>[out], or null.</summary>
    public Parameter? Bias => _bias;

    /// <summary>y = x Wᵀ + b. Shapes: x [.., in], y [.., out].</summary>
    public override Tensor forward(Tensor input) => nn.functional.linear(input, _weight, _bias);

    /// <summary>dx = dy W. Shapes: dy [rows, out], dx [rows, in].</summary>
    public Tensor InputGradient(Tensor dy) => dy.mm(_weight);

    /// <summary>dx += dy W, in place.</summary>
    public void AddInputGradient(Tensor dx, Tensor dy) => dx.addmm_(dy, _weight);

    /// <summary>W.grad += dyᵀ x and b.grad += Σ dy, each only where it is trained. Shapes: x [rows, in], dy [rows, out].</summary>
    public void AccumulateGradients(Tensor x, Tensor dy)
    {
        Gradients.AccumulateProduct(_weight, dy, x);
        if (_bias is not { requires_grad: true }) return;
        using var db = dy.sum(0, type: Gradients.AccumulationType(dy.dtype));
        Gradients.Accumulate(_bias, db);
    }

    private static Parameter InitialWeight(long inFeatures, long outFeatures, ScalarType dtype, Device? device)
    {
        double bound = 1 / Math.Sqrt(inFeatures);
        using var noGrad = no_grad();
        return new Parameter(empty([outFeatures, inFeatures], dtype, device).uniform_(-bound, bound));
    }
}
