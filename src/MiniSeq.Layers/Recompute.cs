using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Activation recomputation (gradient checkpointing; Chen et al. 2016, arXiv 1604.06174): only the input is kept, and backward runs
/// the function again. PyTorch's <c>torch.utils.checkpoint</c>.
/// </summary>
/// <remarks>
/// The random state of forward is restored for the second run, so dropout draws the same mask. May be nested. An exception in the
/// function during backward leaves <c>loss.backward()</c> as an error of libtorch, and <see cref="AutogradNode.Backward"/> as it was thrown.
/// Gradients of parameters used inside are added to <c>.grad</c>; they are not outputs of <c>autograd.grad</c>.
/// </remarks>
public static class Recompute
{
    /// <summary>y = function(x), recomputed in backward.</summary>
    /// <param name="function">Any computation on tensors; it runs twice and must give the same values.</param>
    /// <param name="input">May be frozen: parameters used inside still get their gradients.</param>
    public static Tensor Run(Func<Tensor, Tensor> function, Tensor input)
    {
        // Whether the function uses trained parameters cannot be seen from here: this leaf keeps the node in the graph either way.
        using var anchor = empty(0).requires_grad_();
        return Record(function, input, [input, anchor]);
    }

    /// <summary>y = module(x), recomputed in backward. Nothing is recorded where neither x nor a parameter is trained.</summary>
    public static Tensor Run(nn.Module<Tensor, Tensor> module, Tensor input) => Record(module.call, input, [input, .. module.parameters()]);

    private static Tensor Record(Func<Tensor, Tensor> function, Tensor input, Tensor[] inputs)
    {
        if (!is_grad_enabled() || !inputs.Any(i => i.requires_grad)) return function(input);
        var random = RandomState.Capture(input.device);
        Tensor Forward()
        {
            using var scope = NewDisposeScope();
            return Owned(function(input), input).MoveToOuterDisposeScope();
        }
        return AutogradNode.Apply(inputs, Forward, [input], Backward(function, random), random);
    }

    // Not in Record, where its closure would hold the input, too.
    private static Func<AutogradNode, Tensor?[], Tensor?[]> Backward(Func<Tensor, Tensor> function, RandomState random) => (node, gradients) =>
    {
        var result = new Tensor?[node.NeedsInputGrad.Count];
        if (gradients[0] is not { } dy) return result;
        using var x = node.Unpack(0);
        node.ReleaseSaved();
        result[0] = Again(function, x, dy, node.NeedsInputGrad[0], random);
        return result;
    };

    // One graph of one function: built, walked and gone before the next.
    internal static Tensor? Again(Func<Tensor, Tensor> function, Tensor x, Tensor dy, bool needsInputGrad, RandomState random)
    {
        var leaf = x.detach().requires_grad_(needsInputGrad);
        Tensor y;
        using (random.Restore())
        using (enable_grad())
            y = function(leaf);
        if (!y.requires_grad) return null; // nothing inside is trained
        autograd.backward([y], [dy]);
        return needsInputGrad ? leaf.grad : null;
    }

    // A function may hand back its own input; the graph needs a tensor of its own.
    internal static Tensor Owned(Tensor output, Tensor input) => ReferenceEquals(output, input) ? input.alias() : output;
}
