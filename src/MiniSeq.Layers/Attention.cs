using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Causal attention on the flash path: memory linear in the sequence, grouped key/value heads never repeated, and documents that
/// share a batch (packed rows) see only themselves. softmax(scale · Q Kᵀ) V for each head (Dao et al. 2022, arXiv 2205.14135).
/// </summary>
/// <remarks>
/// Rows are tokens: q [rows, Hq, D], k and v [rows, Hkv, D]; a document is a run of rows. On the CPU this is libtorch's flash
/// kernel, which also hands out the log-sum-exp that backward needs; on other devices it is scaled_dot_product_attention.
/// </remarks>
public static class Attention
{
    /// <summary>The output and, on the CPU, the log-sum-exp of each document, kept or recomputed for <see cref="Backward"/>.</summary>
    /// <param name="Output">[rows, Hq, D].</param>
    /// <param name="LogSumExp">One [1, Hq, length] a document; empty where the device keeps none.</param>
    public sealed record Result(Tensor Output, IReadOnlyList<Tensor> LogSumExp) : IDisposable
    {
        /// <summary>Moves the tensors to the enclosing dispose scope.</summary>
        public Result MoveToOuterDisposeScope()
        {
            Output.MoveToOuterDisposeScope();
            foreach (var t in LogSumExp) t.MoveToOuterDisposeScope();
            return this;
        }

        /// <summary>Takes the tensors out of every dispose scope: the caller disposes the result.</summary>
        public Result DetachFromDisposeScope()
        {
            Output.DetachFromDisposeScope();
            foreach (var t in LogSumExp) t.DetachFromDisposeScope();
            return this;
        }

        /// <inheritdoc/>
        public void Dispose()
        {
            Output.Dispose();
            foreach (var t in LogSumExp) t.Dispose();
        }
    }

    /// <summary>Attention of every document of a packed batch. Records no graph.</summary>
    /// <param name="q">[rows, Hq, D].</param>
    /// <param name="k">[rows, Hkv, D], Hkv divides Hq.</param>
    /// <param name="v">[rows, Hkv, D].</param>
    /// <param name="lengths">Rows of each document; their sum is the number of rows.</param>
    /// <param name="scale">Factor of Q Kᵀ, usually D^−½.</param>
    public static Result Forward(Tensor q, Tensor k, Tensor v, IReadOnlyList<long> lengths, double scale)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var sums = new List<Tensor>();
        Tensor? output = null;
        long start = 0;
        foreach (long length in lengths)
        {
            var (o, lse) = One(Document(q, start, length), Document(k, start, length), Document(v, start, length), causal: true, scale);
            if (lse is not null) sums.Add(lse);
            Place(ref output, o, q, start, lengths.Count);
            start += length;
        }
        return new Result(output!, sums).MoveToOuterDisposeScope();
    }

    /// <summary>Gradients of q, k and v, shaped like them, from that of the output [rows, Hq, D].</summary>
    public static (Tensor Dq, Tensor Dk, Tensor Dv) Backward(Tensor dOutput, Tensor q, Tensor k, Tensor v, Result forward, IReadOnlyList<long> lengths, double scale)
    {
        using var scope = NewDisposeScope();
        Tensor? dq = null, dk = null, dv = null;
        long start = 0;
        for (int i = 0; i < lengths.Count; i++)
        {
            using var document = NewDisposeScope();
            long length = lengths[i];
            Tensor At(Tensor t) => Document(t, start, length);
            var (gq, gk, gv) = forward.LogSumExp.Count > 0
                ? Aten.FlashAttentionBackward(At(dOutput), At(q), At(k), At(v), At(forward.Output), forward.LogSumExp[i], causal: true, scale)
                : GraphBackward(At(dOutput), At(q), At(k), At(v), scale);
            Place(ref dq, gq, q, start, lengths.Count);
            Place(ref dk, gk, k, start, lengths.Count);
            Place(ref dv, gv, v, start, lengths.Count);
            start += length;
        }
        return (dq!.MoveToOuterDisposeScope(), dk!.MoveToOuterDisposeScope(), dv!.MoveToOuterDisposeScope());
    }

    /// <summary>New rows of one document against all its rows so far: one row, or all of them (generation with a cache).</summary>
    /// <param name="q">[n, Hq, D]; n is 1, or the length of k.</param>
    /// <param name="k">[length, Hkv, D], the new rows included.</param>
    /// <param name="v">[length, Hkv, D].</param>
    /// <param name="scale">Factor of Q Kᵀ.</param>
    /// <returns>[n, Hq, D].</returns>
    public static Tensor WithCache(Tensor q, Tensor k, Tensor v, double scale)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        if (q.size(0) != 1 && q.size(0) != k.size(0)) throw new ArgumentException($"{q.size(0)} new rows of {k.size(0)}: give one row, or all.", nameof(q));
        var (o, _) = One(Document(q, 0, q.size(0)), Document(k, 0, k.size(0)), Document(v, 0, v.size(0)), causal: q.size(0) > 1, scale);
        return o.transpose(1, 2).squeeze(0).MoveToOuterDisposeScope();
    }

    /// <summary>The plain form, for autograd: q [batch, Hq, S, D], k and v [batch, Hkv, S, D], causal.</summary>
    public static Tensor Plain(Tensor q, Tensor k, Tensor v, double scale) =>
        Aten.ScaledDotProductAttention(q, k, v, causal: true, scale);

    private static (Tensor Output, Tensor? LogSumExp) One(Tensor q, Tensor k, Tensor v, bool causal, double scale) =>
        q.device_type == DeviceType.CPU
            ? Aten.FlashAttention(q, k, v, causal, scale)
            : (Aten.ScaledDotProductAttention(q, k, v, causal, scale), null);

    private static (Tensor, Tensor, Tensor) GraphBackward(Tensor dOutput, Tensor q, Tensor k, Tensor v, double scale)
    {
        using var grad = enable_grad();
        Tensor[] leaves = [q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()];
        autograd.backward([Plain(leaves[0], leaves[1], leaves[2], scale)], [dOutput]);
        return (leaves[0].grad!, leaves[1].grad!, leaves[2].grad!);
    }

    /// <summary>Rows start.. of a document as [1, heads, length, D], a view.</summary>
    private static Tensor Document(Tensor t, long start, long length)
    {
        using var rows = t.narrow(0, start, length);
        using var batch = rows.unsqueeze(0);
        return batch.transpose(1, 2);
    }

    // The kernels write [1, length, heads, D] seen as [1, heads, length, D]: the only document of a batch needs no copy.
    private static void Place(ref Tensor? all, Tensor part, Tensor like, long start, int documents)
    {
        var rows = part.transpose(1, 2).squeeze(0);
        if (documents == 1)
        {
            all = rows.contiguous().MoveToOuterDisposeScope();
            return;
        }
        all ??= empty([like.size(0), part.size(1), part.size(3)], part.dtype, part.device).MoveToOuterDisposeScope();
        all.narrow(0, start, rows.size(0)).copy_(rows);
    }
}
