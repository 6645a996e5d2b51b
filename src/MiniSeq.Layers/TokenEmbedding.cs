using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Token embeddings, x = E[ids], as a forward/backward pair. Parameter name: <c>weight</c> [V, d]; of an adapter
/// <c>lora_embedding_A.weight</c> [r, V] and <c>lora_embedding_B.weight</c> [d, r].
/// </summary>
public sealed class TokenEmbedding : nn.Module<Tensor, Tensor>, IAdaptable
{
    private readonly Parameter _weight;
    private LoraAdapter? _adapter;

    /// <summary>Embeddings drawn from a standard normal distribution, as <c>torch.nn.Embedding</c> draws them.</summary>
    public TokenEmbedding(long vocabularySize, long hiddenSize, ScalarType dtype = ScalarType.Float32, Device? device = null) : base(nameof(TokenEmbedding))
    {
        using var noGrad = no_grad();
        _weight = new Parameter(empty([vocabularySize, hiddenSize], dtype, device).normal_());
        register_parameter("weight", _weight);
    }

    /// <summary>Embeddings over an existing parameter [V, d].</summary>
    public TokenEmbedding(Parameter weight) : base(nameof(TokenEmbedding))
    {
        _weight = weight;
        register_parameter("weight", _weight);
    }

    /// <summary>E, [V, d]. A head may share it (tied embeddings).</summary>
    public Parameter Weight => _weight;

    /// <summary>What is added to E, or null: A [r, V], B [d, r]. Setting it puts its parameters among those of this module, or takes them out.</summary>
    /// <exception cref="ArgumentException">A and B do not fit E.</exception>
    public LoraAdapter? Adapter
    {
        get => _adapter;
        set
        {
            value?.CheckFits(_weight.size(1), _weight.size(0));
            LoraAdapter.Register(this, "lora_embedding_", value);
            _adapter = value;
        }
    }

    /// <summary>x [.., d] for ids [..] int64. Records an ordinary autograd graph.</summary>
    public override Tensor forward(Tensor input)
    {
        using var scope = NewDisposeScope();
        var ids = input.reshape(-1);
        var x = _weight.index_select(0, ids);
        _adapter?.AddRowsTo(x, ids);
        return x.view([.. input.shape, _weight.size(1)]).MoveToOuterDisposeScope();
    }

    /// <summary>E.grad[ids] += dx, and the adapter's. Shapes: ids [rows], dx [rows, d].</summary>
    public void Backward(Tensor ids, Tensor dx)
    {
        _adapter?.AccumulateRowGradients(ids, dx);
        if (!_weight.requires_grad) return;
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        if (_weight.grad is null) _weight.grad = zeros(_weight.shape, Gradients.AccumulationType(_weight.dtype), _weight.device);
        var gradient = _weight.grad!;
        gradient.index_add_(0, ids, dx.to(gradient.dtype), 1);
    }

    /// <summary>E += s (B A)ᵀ; the adapter is gone. Rounded to the weight's type once.</summary>
    public void MergeAdapter()
    {
        if (_adapter is not { } adapter) return;
        using var scope = NewDisposeScope();
        adapter.MergeInto(_weight, adapter.A.t(), adapter.B.t());
        Adapter = null;
        adapter.Dispose();
    }

    /// <summary>E + s (B A)ᵀ [V, d], a new tensor; E itself where there is no adapter.</summary>
    public Tensor MergedWeight()
    {
        if (_adapter is not { } adapter) return _weight;
        using var scope = NewDisposeScope();
        return adapter.Merged(_weight, adapter.A.t(), adapter.B.t()).MoveToOuterDisposeScope();
    }
}
