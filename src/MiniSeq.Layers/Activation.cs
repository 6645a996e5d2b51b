using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>The activation of a gated MLP.</summary>
public enum Activation
{
    /// <summary>x σ(x), Hugging Face <c>silu</c>.</summary>
    Silu,

    /// <summary>½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), Hugging Face <c>gelu_pytorch_tanh</c>.</summary>
    GeluTanh,
}

internal static class ActivationFunctions
{
    private const double GeluScale = 0.79788456080286535588; // √(2/π)
    private const double GeluCubic = 0.044715;

    /// <summary>act(x), computed in the memory of x where that can be.</summary>
    public static Tensor Apply_(Activation activation, Tensor x) => activation switch
    {
        Activation.Silu => x.silu_(),
        Activation.GeluTanh => nn.functional.gelu(x, TorchSharp.Modules.GELU.Approximate.tanh),
        _ => throw new ArgumentOutOfRangeException(nameof(activation), activation, null),
    };

    /// <summary>act(x) and act'(x); x itself is used up.</summary>
    public static (Tensor Value, Tensor Derivative) WithDerivative_(Activation activation, Tensor x) => activation switch
    {
        Activation.Silu => Silu_(x),
        Activation.GeluTanh => GeluTanh_(x),
        _ => throw new ArgumentOutOfRangeException(nameof(activation), activation, null),
    };

    // s = σ(x), a = x s, a' = s + a (1 − s) = s + a − a s
    private static (Tensor, Tensor) Silu_(Tensor x)
    {
        var s = x.sigmoid();
        var value = x.mul_(s);
        var derivative = s.addcmul_(value, s, -1).add_(value);
        return (value, derivative);
    }

    // t = tanh(k (x + c x³)), a = ½ x (1 + t), a' = ½ (1 + t) + ½ x (1 − t²) k (1 + 3 c x²)
    private static (Tensor, Tensor) GeluTanh_(Tensor x)
    {
        var square = x * x;
        var t = (square * GeluCubic).add_(1).mul_(x).mul_(GeluScale).tanh_();
        var half = (t + 1).mul_(0.5);
        var inner = square.mul_(3 * GeluCubic).add_(1).mul_(0.5 * GeluScale).mul_(x);
        var derivative = t.mul_(t).neg_().add_(1).mul_(inner).add_(half);
        return (half.mul_(x), derivative);
    }
}
