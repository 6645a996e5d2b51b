using MiniSeq.Layers.Kernels;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// The gated MLP of Llama-like models, y = W_d (act(W_g x) ⊙ W_u x), in mini-sequences: forward and backward hold the
/// intermediates of one chunk of rows, never of the whole sequence (Mini-Sequence Transformer, arXiv 2407.15892, algorithm 1).
/// </summary>
/// <remarks>
/// Only x is kept for backward, which recomputes gate and up a chunk at a time: 11 matrix products in all against 9 unchunked and
/// 12 with recomputation of the whole layer (adapters add some of low rank). Outputs and gradients are those of the unchunked layer. Weight gradients are added to
/// <c>.grad</c> directly (float32 for 16-bit weights), so <c>autograd.grad</c> for a weight and double backward are not available.
/// Names of parameters follow Hugging Face: <c>gate_proj</c>, <c>up_proj</c>, <c>down_proj</c>.
/// </remarks>
public sealed class GatedMlp : nn.Module<Tensor, Tensor>
{
    private readonly Projection _gate;
    private readonly Projection _up;
    private readonly Projection _down;
    private readonly Activation _activation;
    private readonly int _chunkSize;

    /// <summary>A gated MLP with new weights.</summary>
    /// <param name="hiddenSize">d, columns of x and y.</param>
    /// <param name="intermediateSize">I, columns of gate and up.</param>
    /// <param name="activation">SiLU makes it SwiGLU, tanh GELU makes it GeGLU.</param>
    /// <param name="bias">Whether the three projections have biases.</param>
    /// <param name="chunkSize">Rows of a mini-sequence, or <see cref="Chunking.Auto"/>.</param>
    /// <param name="dtype">Type of the weights.</param>
    /// <param name="device">Device of the weights.</param>
    public GatedMlp(long hiddenSize, long intermediateSize, Activation activation = Activation.Silu, bool bias = false,
        int chunkSize = Chunking.Auto, ScalarType dtype = ScalarType.Float32, Device? device = null)
        : this(new Projection(hiddenSize, intermediateSize, bias, dtype, device), new Projection(hiddenSize, intermediateSize, bias, dtype, device),
            new Projection(intermediateSize, hiddenSize, bias, dtype, device), activation, chunkSize)
    {
    }

    /// <summary>A gated MLP over existing projections, shared and not copied.</summary>
    /// <param name="gate">d to I.</param>
    /// <param name="up">d to I.</param>
    /// <param name="down">I to d.</param>
    /// <param name="activation">SiLU makes it SwiGLU, tanh GELU makes it GeGLU.</param>
    /// <param name="chunkSize">Rows of a mini-sequence, or <see cref="Chunking.Auto"/>.</param>
    public GatedMlp(Projection gate, Projection up, Projection down, Activation activation = Activation.Silu, int chunkSize = Chunking.Auto) : base(nameof(GatedMlp))
    {
        ArgumentOutOfRangeException.ThrowIfNegative(chunkSize);
        (_gate, _up, _down) = (gate, up, down);
        (_activation, _chunkSize) = (activation, chunkSize);
        register_module("gate_proj", _gate);
        register_module("up_proj", _up);
        register_module("down_proj", _down);
    }

    /// <summary>W_g with its bias.</summary>
    public Projection GateProj => _gate;

    /// <summary>W_u with its bias.</summary>
    public Projection UpProj => _up;

    /// <summary>W_d with its bias.</summary>
    public Projection DownProj => _down;

    /// <summary>y for x [.., d]; rows = the product of all but the last dimension.</summary>
    /// <exception cref="ArgumentException">x does not end in the hidden size.</exception>
    public override Tensor forward(Tensor input)
    {
        long hidden = _gate.Weight.size(1);
        if (input.dim() == 0 || input.size(-1) != hidden)
            throw new ArgumentException($"GatedMlp takes [.., {hidden}], and got [{string.Join(", ", input.shape)}].", nameof(input));
        Tensor[] inputs = [input, .. parameters()];
        return AutogradNode.Apply(inputs, () => ForwardAll(input), [input], Backward);
    }

    private Tensor?[] Backward(AutogradNode node, Tensor?[] gradients)
    {
        using var x = node.Unpack(0);
        node.ReleaseSaved();
        var result = new Tensor?[node.NeedsInputGrad.Count];
        if (gradients[0] is { } dy) result[0] = BackwardAll(x, dy, node.NeedsInputGrad[0]);
        return result; // the weights' gradients are in .grad already
    }

    /// <summary>The layer as a user of TorchSharp would write it, unchunked and recorded by autograd. Shapes: x [.., d], y [.., d].</summary>
    public Tensor Plain(Tensor x)
    {
        using var scope = NewDisposeScope();
        return _down.call(ActivationFunctions.Apply(_activation, _gate.call(x)) * _up.call(x)).MoveToOuterDisposeScope();
    }

    /// <summary>y of one mini-sequence. Shapes: x [rows, d], y [rows, d]. Records no graph of its own.</summary>
    /// <param name="x">[rows, d].</param>
    /// <param name="keep">Where gate and up [rows, I] are written, if backward is not to compute them again.</param>
    /// <param name="dropout">The rows' numbers, for adapters with dropout; null drops nothing.</param>
    public Tensor ForwardChunk(Tensor x, (Tensor Gate, Tensor Up)? keep = null, DropoutRows? dropout = null)
    {
        using var scope = NewDisposeScope();
        var (gate, up) = (_gate.forward(x, dropout), _up.forward(x, dropout));
        keep?.Gate.copy_(gate);
        keep?.Up.copy_(up);
        return OutputChunk(gate, up, dropout).MoveToOuterDisposeScope();
    }

    /// <summary>y = W_d (act(gate) ⊙ up) of gate and up [rows, I] that were kept.</summary>
    public Tensor OutputChunk(Tensor gate, Tensor up, DropoutRows? dropout = null)
    {
        using var scope = NewDisposeScope();
        var hidden = HasKernel(gate) ? RowKernels.Swiglu(gate, up) : ActivationFunctions.Apply(_activation, gate).mul_(up);
        return _down.forward(hidden, dropout).MoveToOuterDisposeScope();
    }

    /// <summary>dx of one mini-sequence from dy; weight gradients are accumulated. Shapes: x, dy and dx [rows, d].</summary>
    /// <param name="x">[rows, d].</param>
    /// <param name="dy">[rows, d].</param>
    /// <param name="kept">Gate and up [rows, I] of forward, no longer valid afterwards; null computes them again.</param>
    /// <param name="needsInputGrad">Whether dx is wanted.</param>
    /// <param name="dropout">As in forward.</param>
    public Tensor? BackwardChunk(Tensor x, Tensor dy, (Tensor Gate, Tensor Up)? kept = null, bool needsInputGrad = true, DropoutRows? dropout = null)
    {
        using var scope = NewDisposeScope();
        var (gate, up) = kept ?? (_gate.forward(x, dropout), _up.forward(x, dropout));
        var (dGate, dUp) = HasKernel(gate) ? BackwardInPlace(gate, up, dy, dropout) : BackwardInside(gate, up, dy, dropout);
        _gate.AccumulateGradients(x, dGate, dropout);              // dW_g += dgᵀ x
        _up.AccumulateGradients(x, dUp, dropout);                  // dW_u += duᵀ x
        if (!needsInputGrad) return null;
        var dx = _gate.InputGradient(dGate, dropout);              // dx = dg W_g + du W_u
        _up.AddInputGradient(dx, dUp, dropout);
        return dx.MoveToOuterDisposeScope();
    }

    // dg and du from dy, and dW_d.
    private (Tensor Gate, Tensor Up) BackwardInside(Tensor gate, Tensor up, Tensor dy, DropoutRows? dropout)
    {
        var act = ActivationFunctions.Apply(_activation, gate);
        using (var hidden = act * up)                              // h = act(g) ⊙ u
            _down.AccumulateGradients(hidden, dy, dropout);        // dW_d += dyᵀ h
        var dHidden = _down.InputGradient(dy, dropout);            // dh = dy W_d
        var dUp = act.mul_(dHidden);                               // du = dh ⊙ act(g)
        return (ActivationFunctions.Backward(_activation, dHidden.mul_(up), gate), dUp); // dg = dh ⊙ u ⊙ act'(g)
    }

    // The same; dg and du take the place of g and u.
    private (Tensor Gate, Tensor Up) BackwardInPlace(Tensor gate, Tensor up, Tensor dy, DropoutRows? dropout)
    {
        using (var hidden = RowKernels.Swiglu(gate, up)) _down.AccumulateGradients(hidden, dy, dropout);
        using var dHidden = _down.InputGradient(dy, dropout);
        RowKernels.SwigluBackward_(dHidden, gate, up);
        return (gate, up);
    }

    private bool HasKernel(Tensor gate) => _activation == Activation.Silu && RowKernels.Take(gate) && gate.is_contiguous();

    private long ChunkRows(Tensor x) => Chunking.Rows(_chunkSize, x.size(0), _gate.Weight.size(0), x.dtype);

    private Tensor ForwardAll(Tensor input)
    {
        using var scope = NewDisposeScope();
        var x = input.reshape(-1, input.size(-1));
        var y = empty_like(x);
        Chunking.ForEach(x.size(0), ChunkRows(x), (start, count) => y.narrow(0, start, count).copy_(ForwardChunk(x.narrow(0, start, count))));
        return y.view(input.shape).MoveToOuterDisposeScope();
    }

    private Tensor? BackwardAll(Tensor input, Tensor gradient, bool needsInputGrad)
    {
        using var scope = NewDisposeScope();
        var x = input.reshape(-1, input.size(-1));
        var dy = gradient.reshape(x.shape);
        var dx = needsInputGrad ? empty_like(x) : null;
        Chunking.ForEach(x.size(0), ChunkRows(x), (start, count) =>
        {
            var chunk = BackwardChunk(x.narrow(0, start, count), dy.narrow(0, start, count), needsInputGrad: needsInputGrad);
            if (chunk is not null) dx!.narrow(0, start, count).copy_(chunk);
        });
        return dx?.view(input.shape).MoveToOuterDisposeScope();
    }
}
