using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>Token embeddings, x = E[ids], as a forward/backward pair. Parameter name: <c>weight</c> [V, d].</summary>
public sealed class TokenEmbedding : nn.Module<Tensor, Tensor>
{
    private readonly Parameter _weight;

    /// <summary>Embeddings drawn from a standard normal distribution, as <c>torch.nn.Embedding</c> draws them.</summary>
    public TokenEmbedding(long vocabularySize, long hiddenSize, ScalarType dtype = ScalarType.Float32, Device? device = null) : base(nameof(TokenEmbedding))
    {
        using var noGrad = no_grad();
        _weight = new Parameter(empty([vocabularySize, hiddenSize], dtype, device).normal_());
        register_parameter("weight", _weight);
    }

    /// <summary>E, [V, d]. A head may share it (tied embeddings).</summary>
    public Parameter Weight => _weight;

    /// <summary>x [.., d] for ids [..] int64. Records an ordinary autograd graph.</summary>
    public override Tensor forward(Tensor input)
    {
        using var scope = NewDisposeScope();
        return _weight.index_select(0, input.reshape(-1)).view([.. input.shape, _weight.size(1)]).MoveToOuterDisposeScope();
    }

    /// <summary>E.grad[ids] += dx. Shapes: ids [rows], dx [rows, d].</summary>
    public void Backward(Tensor ids, Tensor dx)
    {
        if (!_weight.requires_grad) return;
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        if (_weight.grad is null) _weight.grad = zeros(_weight.shape, Gradients.AccumulationType(_weight.dtype), _weight.device);
        var gradient = _weight.grad!;
        gradient.index_add_(0, ids, dx.to(gradient.dtype), 1);
    }
}
