using MiniSeq.Layers.Kernels;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// RMSNorm, y = x / √(mean(x²) + ε) ⊙ w (Zhang and Sennrich 2019, arXiv 1910.07467), statistics in float32 or better; Gemma's has 1 + w for w.
/// Row-wise, so a forward/backward pair serves any mini-sequence. Parameter name: <c>weight</c> [d].
/// </summary>
public sealed class RmsNorm : nn.Module<Tensor, Tensor>
{
    private readonly Parameter _weight;
    private readonly double _eps;
    private readonly bool _unitOffset;

    /// <summary>A norm that scales by 1.</summary>
    /// <param name="hiddenSize">d, the last dimension of x.</param>
    /// <param name="eps">ε, Hugging Face <c>rms_norm_eps</c>.</param>
    /// <param name="dtype">Type of the weight.</param>
    /// <param name="device">Device of the weight.</param>
    /// <param name="unitOffset">Whether the factor is 1 + w, applied before rounding to the type of x (Gemma), and w begins at 0.</param>
    public RmsNorm(long hiddenSize, double eps = 1e-6, ScalarType dtype = ScalarType.Float32, Device? device = null, bool unitOffset = false) : base(nameof(RmsNorm))
    {
        using var noGrad = no_grad();
        _weight = new Parameter(unitOffset ? zeros(hiddenSize, dtype, device) : ones(hiddenSize, dtype, device));
        (_eps, _unitOffset) = (eps, unitOffset);
        register_parameter("weight", _weight);
    }

    /// <summary>w, [d].</summary>
    public Parameter Weight => _weight;

    /// <summary>y, same shape and type as x [.., d]. Records an ordinary autograd graph.</summary>
    public override Tensor forward(Tensor input)
    {
        if (RowKernels.Take(input, _weight)) return RowKernels.Norm(input, _weight, _eps, _unitOffset);
        using var scope = NewDisposeScope();
        var (normed, _) = Normalize(input);
        var y = _unitOffset ? (normed * Factor(normed.dtype)).to(input.dtype) : normed.to(input.dtype) * _weight;
        return y.MoveToOuterDisposeScope();
    }

    /// <summary>dx for dy, both [.., d]; the weight's gradient is accumulated.</summary>
    /// <remarks>n = x r, r = (mean(x²) + ε)^−½; dw = Σ dy ⊙ n; g = dy ⊙ w; dx = r (g − n mean(g ⊙ n)).</remarks>
    public Tensor Backward(Tensor x, Tensor dy)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        if (RowKernels.Take(x, _weight) && dy.dtype == x.dtype)
        {
            var (dx, dw) = RowKernels.NormBackward(x, dy, _weight, _eps, _unitOffset, _weight.requires_grad);
            if (dw is not null) Gradients.Accumulate(_weight, dw);
            return dx.MoveToOuterDisposeScope();
        }
        var (n, r) = Normalize(x);
        var g = dy.to(n.dtype);
        if (_weight.requires_grad) Gradients.Accumulate(_weight, (g * n).reshape(-1, n.size(-1)).sum(dim: 0));
        g = g * Factor(n.dtype);
        var mean = (g * n).mean([-1], keepdim: true);
        return g.sub_(n.mul_(mean)).mul_(r).to(x.dtype).MoveToOuterDisposeScope();
    }

    private Tensor Factor(ScalarType wide) => _unitOffset ? _weight.to(wide) + 1 : _weight;

    private (Tensor Normed, Tensor InverseRms) Normalize(Tensor x)
    {
        var wide = x.to(Gradients.AccumulationType(x.dtype));
        var r = (wide * wide).mean([-1], keepdim: true).add_(_eps).rsqrt_();
        return (wide * r, r);
    }
}
