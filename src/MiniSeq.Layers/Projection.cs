using MiniSeq.Layers.Kernels;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// A linear layer y = x Wᵀ + b as a forward/backward pair, so that mini-sequence layers can drive its gradients a chunk at a time.
/// Parameters are named as in <c>torch.nn.Linear</c>: <c>weight</c> [out, in] and, where there is one, <c>bias</c> [out].
/// An adapter adds s dropout(x) Aᵀ Bᵀ to y, with parameters named as PEFT names them: <c>lora_A.weight</c>, <c>lora_B.weight</c>.
/// </summary>
/// <remarks>
/// Calling it like any module records an ordinary autograd graph, and drops nothing. An adapter's dropout acts where
/// <see cref="DropoutRows"/> are given: the same ones for every part of a forward and its backward.
/// </remarks>
public sealed class Projection : nn.Module<Tensor, Tensor>, IAdaptable
{
    private readonly Parameter _weight;
    private readonly Parameter? _bias;
    private LoraAdapter? _adapter;

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

    /// <summary>What is added to W, or null. Setting it puts its parameters among those of this module, or takes them out.</summary>
    /// <exception cref="ArgumentException">A and B do not fit W.</exception>
    public LoraAdapter? Adapter
    {
        get => _adapter;
        set
        {
            value?.CheckFits(_weight.size(0), _weight.size(1));
            LoraAdapter.Register(this, "lora_", value);
            _adapter = value;
        }
    }

    /// <summary>y = x Wᵀ + b, and what the adapter adds. Shapes: x [.., in], y [.., out].</summary>
    public override Tensor forward(Tensor input) => forward(input, null);

    /// <summary>The same, with the adapter's dropout on the rows of the given numbers.</summary>
    public Tensor forward(Tensor input, DropoutRows? dropout)
    {
        var y = nn.functional.linear(input, _weight, _bias);
        if (_adapter is null) return y;
        using var scope = NewDisposeScope();
        _adapter.AddTo(y.view(-1, y.size(-1)), input.reshape(-1, input.size(-1)), dropout);
        return y;
    }

    /// <summary>dx = dy W, and through the adapter. Shapes: dy [rows, out], dx [rows, in].</summary>
    public Tensor InputGradient(Tensor dy, DropoutRows? dropout = null)
    {
        var dx = LongProduct.Takes(dy, _weight) ? LongProduct.Multiply(dy, _weight) : dy.mm(_weight);
        _adapter?.AddInputGradient(dx, dy, dropout);
        return dx;
    }

    /// <summary>dx += dy W, and through the adapter, in place.</summary>
    public void AddInputGradient(Tensor dx, Tensor dy, DropoutRows? dropout = null)
    {
        dx.addmm_(dy, _weight);
        _adapter?.AddInputGradient(dx, dy, dropout);
    }

    /// <summary>W.grad += dyᵀ x and b.grad += Σ dy, and the adapter's, each only where it is trained. Shapes: x [rows, in], dy [rows, out].</summary>
    public void AccumulateGradients(Tensor x, Tensor dy, DropoutRows? dropout = null)
    {
        Gradients.AccumulateProduct(_weight, dy, x);
        _adapter?.AccumulateGradients(x, dy, dropout);
        if (_bias is not { requires_grad: true }) return;
        using var db = dy.sum(0, type: Gradients.AccumulationType(dy.dtype));
        Gradients.Accumulate(_bias, db);
    }

    /// <summary>W += s B A; the adapter is gone. Rounded to the weight's type once.</summary>
    public void MergeAdapter()
    {
        if (_adapter is not { } adapter) return;
        adapter.MergeInto(_weight, adapter.B, adapter.A);
        Adapter = null;
        adapter.Dispose();
    }

    /// <summary>W + s B A [out, in], a new tensor; W itself where there is no adapter.</summary>
    public Tensor MergedWeight() => _adapter is null ? _weight : _adapter.Merged(_weight, _adapter.B, _adapter.A);

    private static Parameter InitialWeight(long inFeatures, long outFeatures, ScalarType dtype, Device? device)
    {
        double bound = 1 / Math.Sqrt(inFeatures);
        using var noGrad = no_grad();
        return new Parameter(empty([outFeatures, inFeatures], dtype, device).uniform_(-bound, bound));
    }
}
