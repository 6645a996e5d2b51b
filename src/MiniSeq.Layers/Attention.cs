using MiniSeq.Layers.Kernels;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Causal attention on the flash path: memory linear in the sequence, grouped key/value heads never repeated, and documents that
/// share a batch (packed rows) see only themselves. softmax(scale · Q Kᵀ) V for each head (Dao et al. 2022, arXiv 2205.14135).
/// </summary>
/// <remarks>
/// Rows are tokens: q [rows, Hq, D], k and v [rows, Hkv, D]; a document is a run of rows. In bfloat16 on a CPU that multiplies it, this is
/// <see cref="FlashKernel"/>, at twice the speed of libtorch's flash kernel. That one serves the other types on the CPU, and also hands out the
/// log-sum-exp that backward needs; on other devices it is scaled_dot_product_attention. Beside our kernel, capped scores and a window
/// that a document is longer than go through <see cref="TiledAttention"/>.
/// </remarks>
public static class Attention
{
    /// <summary>Rows of a tile of scores, where attention runs in tiles.</summary>
    public const int TileQueries = 256;

    /// <summary>Columns of such a tile.</summary>
    public const int TileKeys = 512;

    /// <summary>The output and, where the form has one, the log-sum-exp of each document, kept or recomputed for <see cref="Backward"/>.</summary>
    /// <param name="Output">[rows, Hq, D].</param>
    /// <param name="LogSumExp">One a document: [1, Hq, n] from a flash kernel, [Hkv, Hq/Hkv · n] from tiles, null where scaled_dot_product_attention keeps none.</param>
    public sealed record Result(Tensor Output, IReadOnlyList<Tensor?> LogSumExp) : IDisposable
    {
        /// <summary>Moves the tensors to the enclosing dispose scope.</summary>
        public Result MoveToOuterDisposeScope()
        {
            Output.MoveToOuterDisposeScope();
            foreach (var t in LogSumExp) t?.MoveToOuterDisposeScope();
            return this;
        }

        /// <summary>Takes the tensors out of every dispose scope: the caller disposes the result.</summary>
        public Result DetachFromDisposeScope()
        {
            Output.DetachFromDisposeScope();
            foreach (var t in LogSumExp) t?.DetachFromDisposeScope();
            return this;
        }

        /// <inheritdoc/>
        public void Dispose()
        {
            Output.Dispose();
            foreach (var t in LogSumExp) t?.Dispose();
        }
    }

    /// <summary>Attention of every document of a packed batch. Records no graph.</summary>
    /// <param name="q">[rows, Hq, D].</param>
    /// <param name="k">[rows, Hkv, D], Hkv divides Hq.</param>
    /// <param name="v">[rows, Hkv, D].</param>
    /// <param name="lengths">Rows of each document; their sum is the number of rows.</param>
    /// <param name="scale">Factor of Q Kᵀ, usually D^−½.</param>
    /// <param name="window">How many tokens a token sees, itself among them (Hugging Face <c>sliding_window</c>); null is all before it.</param>
    /// <param name="softcap">Scores s become softcap · tanh(s / softcap) (Gemma 2, <c>attn_logit_softcapping</c>); null leaves them.</param>
    /// <param name="queries">Where q has only the last rows of each document, how many; null is all of them.</param>
    /// <exception cref="ArgumentException">Types or shapes do not fit.</exception>
    public static Result Forward(Tensor q, Tensor k, Tensor v, IReadOnlyList<long> lengths, double scale, long? window = null, double? softcap = null, IReadOnlyList<long>? queries = null)
    {
        Check(q, k, v, lengths, queries);
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var sums = new List<Tensor?>();
        Tensor? output = null;
        foreach (var document in Documents(lengths, queries))
        {
            using var one = NewDisposeScope();
            var (o, lse) = document.Queries == 0 ? (q.narrow(0, document.FirstQuery, 0), null) : One(document.Q(q), document.Rows(k), document.Rows(v), scale, window, softcap);
            sums.Add(lse?.MoveToOuterDisposeScope());
            Place(ref output, o, q, document.FirstQuery, lengths.Count);
        }
        return new Result(output!, sums).MoveToOuterDisposeScope();
    }

    /// <summary>Whether backward of queries like these needs of the output no more than <see cref="Delta"/>, and takes the memory of q, k and v for its results.</summary>
    /// <param name="q">[rows, Hq, D].</param>
    /// <param name="lengths">As in <see cref="Forward"/>.</param>
    /// <param name="queries">As in <see cref="Forward"/>.</param>
    public static bool WorksInPlace(Tensor q, IReadOnlyList<long> lengths, IReadOnlyList<long>? queries = null) => Documents(lengths, queries).All(d => FlashKernel.Takes(d.Q(q)));

    /// <summary>Σ dy ⊙ y of each row and head, [rows, Hq] float32: what the softmax's gradient takes of the output. Shapes: [rows, Hq, D].</summary>
    public static Tensor Delta(Tensor dOutput, Tensor output)
    {
        using var scope = NewDisposeScope();
        var delta = empty(output.shape[..^1], ScalarType.Float32, output.device);
        Chunking.ForEach(output.size(0), Chunking.FullSpeedRows, (start, count) =>
            delta.narrow(0, start, count).copy_((dOutput.narrow(0, start, count).to(ScalarType.Float32) * output.narrow(0, start, count)).sum(-1)));
        return delta.MoveToOuterDisposeScope();
    }

    /// <summary>The same as <see cref="Backward"/> where <see cref="WorksInPlace"/>: dq, dk and dv take the place of q, k and v.</summary>
    /// <param name="dOutput">[rows, Hq, D].</param>
    /// <param name="q">Contiguous, as k and v.</param>
    /// <param name="k">As in forward.</param>
    /// <param name="v">As in forward.</param>
    /// <param name="delta">[rows, Hq], <see cref="Delta"/>.</param>
    /// <param name="logSumExp">Forward's.</param>
    /// <param name="lengths">As in forward.</param>
    /// <param name="scale">As in forward.</param>
    /// <param name="window">As in forward.</param>
    /// <param name="softcap">As in forward.</param>
    /// <param name="queries">As in forward.</param>
    public static void Backward_(Tensor dOutput, Tensor q, Tensor k, Tensor v, Tensor delta, IReadOnlyList<Tensor?> logSumExp, IReadOnlyList<long> lengths, double scale,
        long? window = null, double? softcap = null, IReadOnlyList<long>? queries = null)
    {
        Check(q, k, v, lengths, queries, dOutput);
        using var scope = NewDisposeScope();
        foreach (var (document, lse) in Documents(lengths, queries).Zip(logSumExp))
        {
            using var one = NewDisposeScope();
            var (dq, dk, dv) = (document.Q(q), document.Rows(k), document.Rows(v));
            new FlashKernel(dq, dk, scale, window, softcap).Backward_(document.Q(dOutput), dq, dk, dv, document.Q(delta), lse!);
        }
    }

    /// <summary>Gradients of q, k and v, shaped like them, from that of the output [rows, Hq, D].</summary>
    public static (Tensor Dq, Tensor Dk, Tensor Dv) Backward(Tensor dOutput, Tensor q, Tensor k, Tensor v, Result forward, IReadOnlyList<long> lengths, double scale,
        long? window = null, double? softcap = null, IReadOnlyList<long>? queries = null)
    {
        Check(q, k, v, lengths, queries, dOutput);
        using var scope = NewDisposeScope();
        Tensor? dq = null, dk = null, dv = null;
        foreach (var (document, lse) in Documents(lengths, queries).Zip(forward.LogSumExp))
        {
            using var one = NewDisposeScope();
            var (gq, gk, gv) = document.Queries == 0
                ? (q.narrow(0, document.FirstQuery, 0), zeros_like(document.Rows(k)), zeros_like(document.Rows(v)))
                : OneBackward(document.Q(dOutput), document.Q(q), document.Rows(k), document.Rows(v), document.Q(forward.Output), lse, scale, window, softcap);
            Place(ref dq, gq, q, document.FirstQuery, lengths.Count);
            Place(ref dk, gk, k, document.FirstRow, lengths.Count);
            Place(ref dv, gv, v, document.FirstRow, lengths.Count);
        }
        return (dq!.MoveToOuterDisposeScope(), dk!.MoveToOuterDisposeScope(), dv!.MoveToOuterDisposeScope());
    }

    /// <summary>New rows of one document against all its rows so far: one row, or all of them (generation with a cache).</summary>
    /// <param name="q">[n, Hq, D]; n is 1, or the length of k.</param>
    /// <param name="k">[length, Hkv, D], the new rows included.</param>
    /// <param name="v">[length, Hkv, D].</param>
    /// <param name="scale">Factor of Q Kᵀ.</param>
    /// <param name="window">As in <see cref="Forward"/>.</param>
    /// <param name="softcap">As in <see cref="Forward"/>.</param>
    /// <returns>[n, Hq, D].</returns>
    public static Tensor WithCache(Tensor q, Tensor k, Tensor v, double scale, long? window = null, double? softcap = null)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        if (q.size(0) != 1 && q.size(0) != k.size(0)) throw new ArgumentException($"{q.size(0)} new rows of {k.size(0)}: give one row, or all.", nameof(q));
        Check(q, k, v, [k.size(0)], [q.size(0)]);
        if (q.size(0) == 1 && window < k.size(0))
            (k, v) = (k.narrow(0, k.size(0) - window.Value, window.Value), v.narrow(0, v.size(0) - window.Value, window.Value));
        return One(q, k, v, scale, window, softcap).Output.MoveToOuterDisposeScope();
    }

    /// <summary>The plain form, for autograd: q [batch, Hq, S, D], k and v [batch, Hkv, S, D], causal; all scores at once where there is a window or a cap.</summary>
    public static Tensor Plain(Tensor q, Tensor k, Tensor v, double scale, long? window = null, double? softcap = null)
    {
        if (window is null && softcap is null) return Aten.ScaledDotProductAttention(q, k, v, causal: true, scale);
        using var scope = NewDisposeScope();
        Tensor Repeated(Tensor t) => t.repeat_interleave(q.size(1) / t.size(1), 1);
        var scores = q.matmul(Repeated(k).transpose(2, 3)) * scale;
        if (softcap is { } cap) scores = (scores / cap).tanh() * cap;
        var hidden = TiledAttention.Hidden(0, q.size(2), 0, k.size(2), window, q.device);
        var p = scores.masked_fill(hidden, double.NegativeInfinity).softmax(-1, Layers.Gradients.AccumulationType(q.dtype)).to(q.dtype);
        return p.matmul(Repeated(v)).MoveToOuterDisposeScope();
    }

    // Kernels see memory, not tensors: nothing that does not fit may reach them.
    private static void Check(Tensor q, Tensor k, Tensor v, IReadOnlyList<long> lengths, IReadOnlyList<long>? queries, Tensor? dOutput = null)
    {
        long rows = lengths.Sum(), n = (queries ?? lengths).Sum();
        bool fits = q.dim() == 3 && k.dim() == 3 && k.shape.AsSpan().SequenceEqual(v.shape) && q.size(2) == k.size(2) && q.size(1) % k.size(1) == 0 && q.size(0) == n && k.size(0) == rows
            && k.dtype == q.dtype && v.dtype == q.dtype && (dOutput is null || (dOutput.dtype == q.dtype && dOutput.shape.AsSpan().SequenceEqual(q.shape)));
        static string Of(Tensor t) => $"{t.dtype} [{string.Join(", ", t.shape)}]";
        if (!fits)
            throw new ArgumentException($"Attention of {n} queries over {rows} rows takes q [{n}, Hq, D], k and v [{rows}, Hkv, D] and, in backward, dy like q, all of one type and Hq a multiple of Hkv; it got q {Of(q)}, k {Of(k)}, v {Of(v)}{(dOutput is null ? "" : $", dy {Of(dOutput)}")}.");
    }

    /// <summary>A document's rows among all, and those of its queries among these.</summary>
    private readonly record struct Document(long FirstRow, long Length, long FirstQuery, long Queries)
    {
        public Tensor Rows(Tensor t) => t.narrow(0, FirstRow, Length);

        public Tensor Q(Tensor t) => t.narrow(0, FirstQuery, Queries);
    }

    private static IEnumerable<Document> Documents(IReadOnlyList<long> lengths, IReadOnlyList<long>? queries)
    {
        long row = 0, query = 0;
        for (int i = 0; i < lengths.Count; i++)
        {
            long asked = queries?[i] ?? lengths[i];
            yield return new Document(row, lengths[i], query, asked);
            (row, query) = (row + lengths[i], query + asked);
        }
    }

    // The newest rows q [n, Hq, D] of a document against all of k and v: output [n, Hq, D].
    private static (Tensor Output, Tensor? LogSumExp) One(Tensor q, Tensor k, Tensor v, double scale, long? window, double? softcap)
    {
        if (FlashKernel.Takes(q)) return new FlashKernel(q, k, scale, window, softcap).Forward(q, k, v);
        if (IsTiled(q, k.size(0), window, softcap)) return new TiledAttention(scale, window, softcap).Forward(q, k, v);
        if (q.device_type != DeviceType.CPU) return (Rows(Aten.ScaledDotProductAttention(Heads(q), Heads(k), Heads(v), causal: q.size(0) > 1, scale)), null);
        long seenByAll = SeenByAll(q, k);
        var (output, lse) = Aten.FlashAttention(Heads(q), Heads(From(k, seenByAll)), Heads(From(v, seenByAll)), causal: q.size(0) > 1, scale);
        if (seenByAll == 0) return (Rows(output), lse);
        // Two softmaxes become one: each part weighs as much as its share of the sum.
        var (earlier, earlierLse) = Aten.FlashAttention(Heads(q), Heads(k.narrow(0, 0, seenByAll)), Heads(v.narrow(0, 0, seenByAll)), causal: false, scale);
        var both = logaddexp(lse, earlierLse);
        Tensor Weighted(Tensor part, Tensor sum) => part * (sum - both).exp_().unsqueeze(-1).to(part.dtype);
        return (Rows(Weighted(output, lse).add_(Weighted(earlier, earlierLse))), both);
    }

    private static (Tensor, Tensor, Tensor) OneBackward(Tensor dOutput, Tensor q, Tensor k, Tensor v, Tensor output, Tensor? logSumExp, double scale, long? window, double? softcap)
    {
        if (logSumExp is not null && FlashKernel.Takes(q))
        {
            var (dq, dk, dv) = (q.contiguous().clone(), k.contiguous().clone(), v.contiguous().clone());
            new FlashKernel(q, k, scale, window, softcap).Backward_(dOutput, dq, dk, dv, Delta(dOutput, output), logSumExp);
            return (dq, dk, dv);
        }
        if (IsTiled(q, k.size(0), window, softcap)) return new TiledAttention(scale, window, softcap).Backward(dOutput, q, k, v, output, logSumExp!);
        if (logSumExp is null)
        {
            var (gq, gk, gv) = GraphBackward(Heads(dOutput), Heads(q), Heads(k), Heads(v), scale);
            return (Rows(gq), Rows(gk), Rows(gv));
        }
        (Tensor Dq, Tensor Dk, Tensor Dv) Part(Tensor keys, Tensor values, bool causal)
        {
            var (gq, gk, gv) = Aten.FlashAttentionBackward(Heads(dOutput), Heads(q), Heads(keys), Heads(values), Heads(output), logSumExp, causal, scale);
            return (Rows(gq), Rows(gk), Rows(gv));
        }
        long seenByAll = SeenByAll(q, k);
        var last = Part(From(k, seenByAll), From(v, seenByAll), causal: q.size(0) > 1);
        if (seenByAll == 0) return last;
        var first = Part(k.narrow(0, 0, seenByAll), v.narrow(0, 0, seenByAll), causal: false);
        return (first.Dq.add_(last.Dq), cat([first.Dk, last.Dk]), cat([first.Dv, last.Dv]));
    }

    // How many keys come before the queries' own rows. These go apart: the kernel's causal mask wants as many keys as queries. One row sees all and needs no mask.
    private static long SeenByAll(Tensor q, Tensor k) => q.size(0) == 1 ? 0 : k.size(0) - q.size(0);

    private static Tensor From(Tensor rows, long start) => rows.narrow(0, start, rows.size(0) - start);

    // Elsewhere than on the CPU there is no kernel for some queries of a longer document.
    private static bool IsTiled(Tensor q, long length, long? window, double? softcap) =>
        softcap is not null || window < length || (q.device_type != DeviceType.CPU && q.size(0) is var n && n > 1 && n < length);

    private static (Tensor, Tensor, Tensor) GraphBackward(Tensor dOutput, Tensor q, Tensor k, Tensor v, double scale)
    {
        using var grad = enable_grad();
        Tensor[] leaves = [q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()];
        autograd.backward([Plain(leaves[0], leaves[1], leaves[2], scale)], [dOutput]);
        return (leaves[0].grad!, leaves[1].grad!, leaves[2].grad!);
    }

    // The kernels' shape [1, heads, length, D] for rows [length, heads, D], a view; and back.
    private static Tensor Heads(Tensor rows) => rows.unsqueeze(0).transpose(1, 2);

    private static Tensor Rows(Tensor heads) => heads.transpose(1, 2).squeeze(0);

    // Written into one tensor of all documents; the only document of a batch needs no copy, as the kernels write row by row.
    private static void Place(ref Tensor? all, Tensor rows, Tensor like, long start, int documents)
    {
        if (documents == 1)
        {
            all = rows.contiguous().MoveToOuterDisposeScope();
            return;
        }
        all ??= empty([like.size(0), rows.size(1), rows.size(2)], rows.dtype, rows.device).MoveToOuterDisposeScope();
        all.narrow(0, start, rows.size(0)).copy_(rows);
    }
}
