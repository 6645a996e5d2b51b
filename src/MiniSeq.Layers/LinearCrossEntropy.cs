using MiniSeq.Layers.Kernels;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>The loss of a batch of tokens: a sum and a count, so that a mean over several micro-batches is exact.</summary>
/// <param name="LossSum">Σ −log softmax(logits)[label] over the labels that are not ignored; float64 scalar tensor.</param>
/// <param name="TokenCount">How many labels are not ignored.</param>
public sealed record TokenLoss(Tensor LossSum, long TokenCount) : IDisposable
{
    /// <summary>LossSum / TokenCount, and 0 where every label is ignored.</summary>
    public double Mean => TokenCount == 0 ? 0 : LossSum.item<double>() / TokenCount;

    /// <inheritdoc/>
    public void Dispose() => LossSum.Dispose();
}

/// <summary>
/// LM head and cross entropy in mini-sequences: logits of [chunk, V] are made, turned into their own gradient in place and dropped,
/// so nothing of size S × V ever exists (Mini-Sequence Transformer, arXiv 2407.15892, algorithm 2, with the sum and not the mean of
/// means). Rows whose label is ignored never meet the vocabulary.
/// </summary>
public static class LinearCrossEntropy
{
    /// <summary>The label that asks for no loss, as in PyTorch and Hugging Face.</summary>
    public const long IgnoreIndex = -100;

    internal const long SoftmaxBytes = 8 << 20;

    /// <summary>
    /// The loss of hidden states under a linear head, differentiable: <c>LossSum.backward()</c> (or of any multiple of it) gives
    /// the gradients of <paramref name="hidden"/> and of the head, the latter added to <c>.grad</c>.
    /// Gradients are formed during the forward pass, so nothing is recomputed: 3 matrix products, as unchunked.
    /// </summary>
    /// <param name="hidden">[.., d] in the head's type; leading dimensions as <paramref name="labels"/>.</param>
    /// <param name="head">The head, weight [V, d].</param>
    /// <param name="labels">[..] int64: the token wanted at each row (already shifted), or <see cref="IgnoreIndex"/>.</param>
    /// <param name="chunkSize">Rows of a mini-sequence, or <see cref="Chunking.Auto"/>.</param>
    /// <param name="softcap">Logits z become softcap · tanh(z / softcap) (Gemma 2, <c>final_logit_softcapping</c>); null leaves them.</param>
    /// <exception cref="ArgumentException">Shapes do not fit, labels are not int64, or a label is outside 0..V−1.</exception>
    public static TokenLoss Loss(Tensor hidden, Projection head, Tensor labels, int chunkSize = Chunking.Auto, double? softcap = null)
    {
        using var scope = NewDisposeScope();
        CheckShapes(hidden, labels);
        var rows = ValidRows(labels, head.Weight.size(0));
        long count = rows.numel();
        Tensor[] trained = [hidden, .. head.parameters()];
        bool record = is_grad_enabled() && trained.Any(t => t.requires_grad);
        var sink = record ? new GradientSink(hidden, head, rows) : null;
        var sum = AutogradNode.Apply(trained, () => SumChunks(hidden, head, labels, rows, chunkSize, softcap, sink), [], Backward(sink), sink);
        return new TokenLoss(sum.MoveToOuterDisposeScope(), count);
    }

    // Not in Loss, where its closure would hold the hidden states, too.
    private static Func<AutogradNode, Tensor?[], Tensor?[]> Backward(GradientSink? sink) => (node, gradients) =>
    {
        var result = new Tensor?[node.NeedsInputGrad.Count];
        if (gradients[0] is { } upstream) result[0] = sink!.Finish(upstream);
        return result;
    };

    /// <summary>
    /// Loss of one mini-sequence and, if <paramref name="scale"/> is given, the gradients of scale · loss: those of the head are
    /// accumulated, that of the rows is returned. Shapes: hidden [rows, d], labels [rows], none of them ignored.
    /// With <paramref name="dropout"/>, an adapter of the head drops.
    /// </summary>
    /// <param name="hidden">[rows, d].</param>
    /// <param name="head">The head.</param>
    /// <param name="labels">[rows] int64.</param>
    /// <param name="scale">Factor of the loss whose gradients are wanted; null wants none.</param>
    /// <param name="needsHiddenGradient">Whether dX is wanted.</param>
    /// <param name="softcap">As in <see cref="Loss"/>.</param>
    /// <param name="dropout">The rows' numbers; null drops nothing.</param>
    /// <param name="gradientFilter">ε of Cut Cross-Entropy (arXiv 2411.09009): a token of the vocabulary whose logit's gradient is below ε · scale in every row of the chunk (its
    /// softmax is below ε, or above 1 − ε where it is the label) is left out of both gradient products: an approximation. Null leaves out nothing.
    /// No effect on a head with an adapter or a bias.</param>
    public static (Tensor LossSum, Tensor? HiddenGradient) Chunk(Tensor hidden, Projection head, Tensor labels, double? scale, bool needsHiddenGradient = true,
        double? softcap = null, DropoutRows? dropout = null, double? gradientFilter = null)
    {
        using var scope = NewDisposeScope();
        var (loss, dLogits) = LossAndLogitGradient(hidden, head, labels, softcap, scale, dropout);
        if (dLogits is null) return (loss.MoveToOuterDisposeScope(), null);
        if (gradientFilter is { } threshold && head.Adapter is null && head.Bias is null && ColumnsAbove(dLogits, threshold * scale!.Value) is { } columns)
        {
            var dx = FilteredGradients(hidden, head, dLogits, columns, needsHiddenGradient);
            return (loss.MoveToOuterDisposeScope(), dx?.MoveToOuterDisposeScope());
        }
        head.AccumulateGradients(hidden, dLogits, dropout);
        var dHidden = needsHiddenGradient ? head.InputGradient(dLogits, dropout).MoveToOuterDisposeScope() : null;
        return (loss.MoveToOuterDisposeScope(), dHidden);
    }

    /// <summary>Loss and correct greedy predictions of one mini-sequence, without gradients: evaluation. Shapes as in <see cref="Chunk"/>; both results are scalars.</summary>
    public static (Tensor LossSum, Tensor Correct) Score(Tensor hidden, Projection head, Tensor labels, double? softcap = null)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var logits = head.forward(hidden);
        var correct = logits.argmax(1).eq(labels).sum();
        var loss = SoftmaxBlocks_(logits, labels, softcap, null);
        return (loss.MoveToOuterDisposeScope(), correct.MoveToOuterDisposeScope());
    }

    /// <summary>The positions of labels [..] that are not ignored, [n] int64.</summary>
    /// <exception cref="ArgumentException">Labels are not int64, or one is outside 0..V−1.</exception>
    public static Tensor ValidRows(Tensor labels, long vocabulary)
    {
        using var scope = NewDisposeScope();
        if (labels.dtype != ScalarType.Int64) throw new ArgumentException($"Labels must be Int64, and are {labels.dtype}.", nameof(labels));
        var flat = labels.reshape(-1);
        var rows = flat.ne(IgnoreIndex).nonzero().reshape(-1);
        if (rows.numel() > 0)
        {
            var valid = flat.index_select(0, rows);
            long lowest = valid.min().item<long>(), highest = valid.max().item<long>();
            if (lowest < 0 || highest >= vocabulary)
                throw new ArgumentException($"Label {(lowest < 0 ? lowest : highest)} is outside the vocabulary 0..{vocabulary - 1} (and is not {IgnoreIndex}, which asks for no loss).", nameof(labels));
        }
        return rows.MoveToOuterDisposeScope();
    }

    private static void CheckShapes(Tensor hidden, Tensor labels)
    {
        if (hidden.dim() != labels.dim() + 1 || !hidden.shape.AsSpan(0, (int)labels.dim()).SequenceEqual(labels.shape))
            throw new ArgumentException($"Hidden states [{string.Join(", ", hidden.shape)}] do not fit labels [{string.Join(", ", labels.shape)}]: the latter must be the former without the last dimension.", nameof(labels));
    }

    // The logits of a chunk become their own gradient, a few rows at a time: those stay in the cache, and are float32 or better only there.
    private static (Tensor Loss, Tensor? LogitGradient) LossAndLogitGradient(Tensor hidden, Projection head, Tensor labels, double? softcap, double? scale, DropoutRows? dropout = null)
    {
        var logits = head.forward(hidden, dropout);
        var loss = SoftmaxBlocks_(logits, labels, softcap, scale);
        return (loss, scale is null ? null : logits);
    }

    private static Tensor SoftmaxBlocks_(Tensor logits, Tensor labels, double? softcap, double? scale)
    {
        if (softcap is null && MatrixKernel.Takes(logits)) return tensor(SoftmaxKernel.CrossEntropy_(logits, labels, scale), ScalarType.Float64);
        var loss = zeros([], ScalarType.Float64, logits.device);
        long block = Math.Max(1, SoftmaxBytes / (logits.size(1) * Gradients.AccumulationType(logits.dtype).ElementSize()));
        Chunking.ForEach(logits.size(0), block, (start, count) => loss.add_(Softmax_(logits.narrow(0, start, count), labels.narrow(0, start, count), softcap, scale)));
        return loss;
    }

    // p = softmax(z), loss = −log p[y], scale · d loss / dz = scale · (p − onehot(y)), which replaces z; through a cap times 1 − tanh².
    private static Tensor Softmax_(Tensor logits, Tensor labels, double? softcap, double? scale)
    {
        var z = logits.to(Gradients.AccumulationType(logits.dtype));
        using var tanh = softcap is { } cap ? z.div_(cap).tanh_().clone() : null;
        if (tanh is not null) z.mul_(softcap!.Value);
        var y = labels.unsqueeze(1);
        var wanted = z.gather(1, y);
        var max = z.amax([1], keepdim: true);
        var sum = z.sub_(max).exp_().sum(1, keepdim: true);                      // z is now exp(z − max)
        var loss = (sum.log() + max - wanted).sum(ScalarType.Float64);
        if (scale is not { } s) return loss;
        z.mul_(sum.reciprocal_().mul_(s));                                       // s · p
        z.scatter_add_(1, y, full_like(wanted, -s));                             // s · (p − onehot)
        if (tanh is not null) z.mul_(tanh.mul_(tanh).neg_().add_(1));
        if (z.dtype != logits.dtype) logits.copy_(z);
        return loss;
    }

    // Columns in which some row's gradient reaches the threshold, [n] int64; null where leaving the others out would save little.
    private static Tensor? ColumnsAbove(Tensor dLogits, double threshold)
    {
        using var scope = NewDisposeScope();
        var largest = zeros(dLogits.size(1), dLogits.dtype, dLogits.device);
        long block = Math.Max(1, SoftmaxBytes / (dLogits.size(1) * dLogits.element_size()));
        Chunking.ForEach(dLogits.size(0), block, (start, count) => largest.copy_(maximum(largest, dLogits.narrow(0, start, count).abs().amax([0]))));
        var columns = largest.ge(threshold).nonzero().reshape(-1);
        return columns.numel() > dLogits.size(1) / 2 ? null : columns.MoveToOuterDisposeScope();
    }

    // Both gradient products over some columns of the logits only (Wijmans et al. 2024, Cut Cross-Entropy, arXiv 2411.09009, section 4.3).
    private static Tensor? FilteredGradients(Tensor hidden, Projection head, Tensor dLogits, Tensor columns, bool needsHiddenGradient)
    {
        using var scope = NewDisposeScope();
        var some = dLogits.index_select(1, columns);
        if (head.Weight.requires_grad)
        {
            using var noGrad = no_grad();
            var dtype = Gradients.AccumulationType(head.Weight.dtype);
            var part = empty([columns.numel(), hidden.size(1)], dtype, hidden.device);
            Gradients.AddProduct(part, some, hidden, add: false);
            if (head.Weight.grad is null) head.Weight.grad = zeros(head.Weight.shape, dtype, hidden.device);
            head.Weight.grad!.index_add_(0, columns, part, 1);
        }
        return needsHiddenGradient ? some.mm(head.Weight.index_select(0, columns)).MoveToOuterDisposeScope() : null;
    }

    private static Tensor SumChunks(Tensor hidden, Projection head, Tensor labels, Tensor rows, int chunkSize, double? softcap, GradientSink? sink)
    {
        using var scope = NewDisposeScope();
        var x = hidden.reshape(-1, hidden.size(-1));
        var y = labels.reshape(-1);
        var total = zeros([], ScalarType.Float64, hidden.device);
        Chunking.ForEach(rows.numel(), Chunking.LogitRows(chunkSize, rows.numel(), head.Weight.size(0), x.dtype), (start, count) =>
        {
            var at = rows.narrow(0, start, count);
            var h = x.index_select(0, at);
            var (loss, dLogits) = LossAndLogitGradient(h, head, y.index_select(0, at), softcap, sink is null ? null : 1);
            total.add_(loss);
            sink?.Add(start, h, dLogits!);
        });
        return total.MoveToOuterDisposeScope();
    }

    /// <summary>Gradients for an upstream gradient that is known only in backward: the head's are held apart and scaled then.</summary>
    private sealed class GradientSink : IDisposable
    {
        private readonly Projection _head;
        private readonly Tensor[] _trained;
        private readonly Tensor?[] _apart; // a gradient for each of them
        private readonly long[] _shape;
        private readonly Tensor _rows;
        private readonly Tensor? _dHidden; // [n, d], the rows that have a label
        private bool _finished;

        public GradientSink(Tensor hidden, Projection head, Tensor rows)
        {
            (_head, _shape) = (head, hidden.shape);
            _trained = [.. head.parameters().Where(p => p.requires_grad)];
            _apart = Array.ConvertAll(_trained, p => zeros(p.shape, Gradients.AccumulationType(p.dtype), p.device).DetachFromDisposeScope());
            _rows = rows.alias().DetachFromDisposeScope();
            _dHidden = hidden.requires_grad ? empty([rows.numel(), hidden.size(-1)], hidden.dtype, hidden.device).DetachFromDisposeScope() : null;
        }

        public void Add(long start, Tensor h, Tensor dLogits)
        {
            Exchange();
            try
            {
                _head.AccumulateGradients(h, dLogits);
            }
            finally
            {
                Exchange();
            }
            _dHidden?.narrow(0, start, h.size(0)).copy_(_head.InputGradient(dLogits));
        }

        // The parameters' own .grad against the ones held apart.
        private void Exchange()
        {
            for (int i = 0; i < _trained.Length; i++)
            {
                using var put = _apart[i];
                _apart[i] = _trained[i].grad?.DetachFromDisposeScope();
                _trained[i].grad = put;
            }
        }

        /// <summary>Scales by the upstream gradient, accumulates the head's gradients and returns that of the hidden states.</summary>
        public Tensor? Finish(Tensor upstream)
        {
            if (_finished) throw new InvalidOperationException("The gradients of this loss were already handed out: backward runs once over it.");
            _finished = true;
            using var scope = NewDisposeScope();
            using var noGrad = no_grad();
            foreach (var (parameter, gradient) in _trained.Zip(_apart)) Gradients.Accumulate(parameter, gradient!.mul_(upstream.to(gradient.dtype)));
            Tensor? full = null;
            if (_dHidden is not null)
            {
                full = zeros([_shape[..^1].Aggregate(1L, (a, b) => a * b), _shape[^1]], _dHidden.dtype, _dHidden.device);
                full.index_copy_(0, _rows, _dHidden.mul_(upstream.to(ScalarType.Float64).item<double>()));
            }
            Dispose(); // not when the graph dies, which may be a step later
            return full?.view(_shape).MoveToOuterDisposeScope();
        }

        public void Dispose()
        {
            foreach (var t in _apart.Append(_rows).Append(_dHidden)) t?.Dispose();
        }
    }
}
