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
    /// <summary>act(x), a new tensor.</summary>
    public static Tensor Apply(Activation activation, Tensor x) => activation switch
    {
        Activation.Silu => nn.functional.silu(x),
        Activation.GeluTanh => nn.functional.gelu(x, TorchSharp.Modules.GELU.Approximate.tanh),
        _ => throw new ArgumentOutOfRangeException(nameof(activation), activation, null),
    };

    /// <summary>dy ⊙ act'(x).</summary>
    public static Tensor Backward(Activation activation, Tensor dy, Tensor x) => activation switch
    {
        Activation.Silu => Aten.SiluBackward(dy, x),
        Activation.GeluTanh => Aten.GeluTanhBackward(dy, x),
        _ => throw new ArgumentOutOfRangeException(nameof(activation), activation, null),
    };
}
