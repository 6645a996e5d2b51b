using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>
/// The same model as a user of TorchSharp would write it: one autograd graph, all intermediates kept, logits of every position and
/// <c>cross_entropy</c>. The reference of the tests and the baseline of the bench; with recomputation, of each layer as a whole.
/// </summary>
public static class PlainDecoder
{
    /// <summary>Logits [batch, S, V] with a graph.</summary>
    /// <param name="model">The weights.</param>
    /// <param name="ids">[batch, S] int64.</param>
    /// <param name="recompute">Whether each layer keeps its input only (activation recomputation).</param>
    public static Tensor Logits(CausalLM model, Tensor ids, bool recompute = false)
    {
        using var scope = NewDisposeScope();
        var x = model.Embed(ids);
        foreach (var layer in model.Layers)
        {
            var next = recompute ? Recompute.Run(t => layer.Plain(t, model.Rotary), x) : layer.Plain(x, model.Rotary);
            x.Dispose(); // the graph keeps what it needs
            x = next;
        }
        return model.Logits(x).MoveToOuterDisposeScope();
    }

    /// <summary>Σ cross entropy of logits[t] against labels[t + 1], a scalar with a graph.</summary>
    /// <param name="model">The weights.</param>
    /// <param name="ids">[batch, S] int64.</param>
    /// <param name="labels">[batch, S] int64, not shifted; −100 asks for no loss.</param>
    /// <param name="recompute">As in <see cref="Logits"/>.</param>
    public static Tensor LossSum(CausalLM model, Tensor ids, Tensor labels, bool recompute = false)
    {
        using var scope = NewDisposeScope();
        var logits = Logits(model, ids, recompute);
        var shifted = logits.narrow(1, 0, ids.size(1) - 1).flatten(0, 1);
        var wide = shifted.to(Gradients.AccumulationType(logits.dtype));
        var targets = labels.narrow(1, 1, ids.size(1) - 1).flatten();
        return nn.functional.cross_entropy(wide, targets, ignore_index: LinearCrossEntropy.IgnoreIndex, reduction: nn.Reduction.Sum).MoveToOuterDisposeScope();
    }
}
