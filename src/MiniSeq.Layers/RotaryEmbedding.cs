using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in Hugging Face's half-split order: the pair (x[i], x[i + D/2]) of a
/// head turns by the angle position · θ^(−2i/D).
/// </summary>
public sealed class RotaryEmbedding : IDisposable
{
    private readonly Tensor _inverseFrequencies; // [D/2]
    private readonly ScalarType _dtype;
    private readonly double _attentionFactor;
    private Tensor? _cos; // [positions, 1, D/2]
    private Tensor? _sin;

    /// <summary>Angles are formed in float32, as Hugging Face does, and cos and sin kept in <paramref name="dtype"/>.</summary>
    /// <param name="headDim">D, even.</param>
    /// <param name="theta">θ, Hugging Face <c>rope_theta</c>.</param>
    /// <param name="dtype">Type of the queries and keys.</param>
    /// <param name="device">Their device.</param>
    /// <param name="scaling">Stretches the angles for texts longer than those of pre-training; null leaves them.</param>
    /// <exception cref="ArgumentException">An odd head dimension.</exception>
    public RotaryEmbedding(long headDim, double theta, ScalarType dtype = ScalarType.Float32, Device? device = null, RopeScaling? scaling = null)
    {
        if (headDim <= 0 || headDim % 2 != 0) throw new ArgumentException($"Rotary embedding needs an even head dimension, and got {headDim}.", nameof(headDim));
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var exponent = arange(0, headDim, 2, ScalarType.Float32, device) / headDim;
        var frequencies = pow(theta, exponent).reciprocal_();
        _inverseFrequencies = (scaling?.Scale(frequencies, theta) ?? frequencies).DetachFromDisposeScope();
        (_dtype, _attentionFactor) = (dtype, scaling?.Magnitude ?? 1);
    }

    /// <summary>cos and sin of rows [positions, 1, D/2]; the caller disposes them.</summary>
    /// <param name="positions">Position of each row in its document, [rows] int64.</param>
    /// <param name="length">One more than the largest position: the tables grow to it once.</param>
    public (Tensor Cos, Tensor Sin) Rows(Tensor positions, long length)
    {
        if (_cos is null || _cos.size(0) < length) Grow(length);
        return (_cos!.index_select(0, positions), _sin!.index_select(0, positions));
    }

    /// <summary>Turns x [rows, heads, D] in place. With sin negated it is the gradient: without a scaling factor it turns back.</summary>
    public static void Rotate_(Tensor x, Tensor cos, Tensor sin)
    {
        using var scope = NewDisposeScope();
        long half = x.size(-1) / 2;
        var first = x.narrow(-1, 0, half);
        var second = x.narrow(-1, half, half);
        var old = first.clone();
        first.mul_(cos).addcmul_(second, sin, -1);
        second.mul_(cos).addcmul_(old, sin, 1);
    }

    /// <summary>Turns x [.., rows, heads, D] and records an autograd graph: the plain form.</summary>
    public static Tensor Rotate(Tensor x, Tensor cos, Tensor sin)
    {
        using var scope = NewDisposeScope();
        var halves = x.chunk(2, -1);
        return cat([halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin], -1).MoveToOuterDisposeScope();
    }

    private void Grow(long length)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var angles = outer(arange(0, length, ScalarType.Float32, _inverseFrequencies.device), _inverseFrequencies).unsqueeze(1);
        Dispose(tablesOnly: true);
        (_cos, _sin) = (Table(angles.cos()), Table(angles.sin()));
    }

    private Tensor Table(Tensor values) => values.mul_(_attentionFactor).to(_dtype).DetachFromDisposeScope();

    private void Dispose(bool tablesOnly)
    {
        _cos?.Dispose();
        _sin?.Dispose();
        if (!tablesOnly) _inverseFrequencies.Dispose();
    }

    /// <inheritdoc/>
    public void Dispose() => Dispose(tablesOnly: false);
}
