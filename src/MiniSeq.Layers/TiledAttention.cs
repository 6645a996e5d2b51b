using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Attention of one document that libtorch's flash kernel cannot compute: a sliding window, capped scores, or both. Tiles of scores
/// with a running softmax (Dao et al. 2022, arXiv 2205.14135, algorithm 1): memory does not grow with the square of the length, and tiles
/// that no query may see are never computed.
/// </summary>
/// <remarks>
/// q [n, Hq, D] are the last n of the rows of k and v [T, Hkv, D]. A token sees itself and, with a window w, the w − 1 before it. Scores are
/// s = cap · tanh(scale · q kᵀ / cap) (Gemma 2, arXiv 2408.00118). Scores, their gradients
/// and the softmax are float32 or better: rounded to 16 bits they would lose five times what the flash kernel loses.
/// </remarks>
internal sealed class TiledAttention(double scale, long? window, double? softcap, long queryRows = Attention.TileQueries, long keyRows = Attention.TileKeys)
{
    private const double Unseen = -1e30; // finite, so that a row without a visible key in a tile stays a number until a later tile

    /// <summary>Output [n, Hq, D] and log-sum-exp [Hkv, Hq/Hkv · n], in blocks of query rows.</summary>
    public (Tensor Output, Tensor LogSumExp) Forward(Tensor q, Tensor k, Tensor v)
    {
        using var scope = NewDisposeScope();
        var (keys, values) = (PerHead(k), PerHead(v));
        var wide = Gradients.AccumulationType(q.dtype);
        var output = empty_like(q);
        var sums = empty([k.size(1), q.size(1) / k.size(1) * q.size(0)], wide, q.device);
        Chunking.ForEach(q.size(0), queryRows, (start, count) =>
        {
            var block = new Block(Grouped(q, start, count, k.size(1)), k.size(0) - q.size(0) + start, count);
            var max = full([block.Q.size(0), block.Q.size(1), 1], Unseen, wide, q.device);
            var sum = zeros_like(max);
            var total = zeros(block.Q.shape, wide, q.device);
            ForEachTile(block, k.size(0), (from, length) =>
            {
                var s = Scores(block, keys, from, length).Scores;
                var higher = maximum(max, s.amax([-1], keepdim: true));
                var shrink = max.sub_(higher).exp_();                       // of what was summed under the old maximum
                var p = s.sub_(higher).exp_();
                sum.mul_(shrink).add_(p.sum(-1, keepdim: true));
                total.mul_(shrink).add_(p.to(v.dtype).bmm(values.narrow(1, from, length)));
                max.copy_(higher);
            });
            Rows(output, start, count, k.size(1)).copy_(Split(total.div_(sum), count));
            Sums(sums, start, count, q.size(0)).copy_(max.add_(sum.log_()).view(k.size(1), -1, count));
        });
        return (output.MoveToOuterDisposeScope(), sums.MoveToOuterDisposeScope());
    }

    /// <summary>Gradients of q, k and v, shaped like them.</summary>
    /// <remarks>p = exp(s − lse); dv += pᵀ dy; ds = p ⊙ (dy vᵀ − Σ dy ⊙ y), through the cap times 1 − (s / cap)²; dq = scale ds k; dk += scale dsᵀ q.</remarks>
    public (Tensor Dq, Tensor Dk, Tensor Dv) Backward(Tensor dOutput, Tensor q, Tensor k, Tensor v, Tensor output, Tensor logSumExp)
    {
        using var scope = NewDisposeScope();
        var (keys, values) = (PerHead(k), PerHead(v));
        var wide = Gradients.AccumulationType(q.dtype);
        var dq = empty_like(q);
        var (dk, dv) = (zeros(k.shape, wide, q.device), zeros(v.shape, wide, q.device));
        var (dKeys, dValues) = (PerHead(dk), PerHead(dv));
        Chunking.ForEach(q.size(0), queryRows, (start, count) =>
        {
            var block = new Block(Grouped(q, start, count, k.size(1)), k.size(0) - q.size(0) + start, count);
            var dy = Grouped(dOutput, start, count, k.size(1));
            var lse = Sums(logSumExp, start, count, q.size(0)).reshape(k.size(1), -1, 1);
            var along = (dy.to(wide) * Grouped(output, start, count, k.size(1))).sum(-1, keepdim: true);
            var dqBlock = zeros(block.Q.shape, wide, q.device);
            ForEachTile(block, k.size(0), (from, length) =>
            {
                Tensor At(Tensor t) => t.narrow(1, from, length);
                var (s, capped) = Scores(block, keys, from, length);
                var p = s.sub_(lse).exp_();
                At(dValues).add_(p.to(v.dtype).transpose(1, 2).bmm(dy));
                var ds = dy.to(wide).bmm(At(values).transpose(1, 2).to(wide)).sub_(along).mul_(p);
                if (capped is not null) ds.mul_(capped.mul_(capped).neg_().add_(1));
                var narrow = ds.mul_(scale).to(q.dtype);
                dqBlock.add_(narrow.bmm(At(keys)));
                At(dKeys).add_(narrow.transpose(1, 2).bmm(block.Q));
            });
            Rows(dq, start, count, k.size(1)).copy_(Split(dqBlock, count));
        });
        return (dq.MoveToOuterDisposeScope(), dk.to(k.dtype).MoveToOuterDisposeScope(), dv.to(v.dtype).MoveToOuterDisposeScope());
    }

    /// <summary>Scores of rows at <paramref name="first"/>.. against keys at <paramref name="from"/>.. where a query may not look: true.</summary>
    public static Tensor Hidden(long first, long count, long from, long length, long? window, Device device)
    {
        using var scope = NewDisposeScope();
        var distance = arange(first, first + count, ScalarType.Int64, device).unsqueeze(1) - arange(from, from + length, ScalarType.Int64, device);
        var hidden = distance.lt(0);
        if (window is { } w) hidden.logical_or_(distance.ge(w));
        return hidden.MoveToOuterDisposeScope();
    }

    /// <summary>A block of queries [Hkv, groups · count, D] whose first row has position <paramref name="First"/> among the keys.</summary>
    private readonly record struct Block(Tensor Q, long First, long Count);

    // Only the tiles that some query of the block may see.
    private void ForEachTile(Block block, long keys, Action<long, long> body)
    {
        long from = window is { } w ? Math.Max(0, block.First - w + 1) : 0;
        long end = Math.Min(keys, block.First + block.Count);
        Chunking.ForEach(end - from, keyRows, (start, length) => body(from + start, length));
    }

    // Masked scores, and s / cap before the mask where there is a cap.
    private (Tensor Scores, Tensor? Capped) Scores(Block block, Tensor keys, long from, long length)
    {
        var wide = Gradients.AccumulationType(keys.dtype);
        var s = block.Q.to(wide).bmm(keys.narrow(1, from, length).transpose(1, 2).to(wide)).mul_(scale);
        Tensor? capped = null;
        if (softcap is { } cap)
        {
            capped = s.div_(cap).tanh_();
            s = capped * cap;
        }
        bool allSeen = from + length - 1 <= block.First && (window is not { } w || from > block.First + block.Count - 1 - w);
        if (!allSeen)
            s.view(s.size(0), -1, block.Count, length).masked_fill_(Hidden(block.First, block.Count, from, length, window, s.device), Unseen);
        return (s, capped);
    }

    private static Tensor PerHead(Tensor t) => t.transpose(0, 1); // [Hkv, T, D], a view

    // Rows of t [n, Hq, D] as [Hkv, groups, count, D], a view.
    private static Tensor Rows(Tensor t, long start, long count, long kvHeads) =>
        t.narrow(0, start, count).view(count, kvHeads, -1, t.size(2)).permute(1, 2, 0, 3);

    // The queries of a key head one below the other: one product for all of a group, and no key repeated.
    private static Tensor Grouped(Tensor t, long start, long count, long kvHeads) => Rows(t.contiguous(), start, count, kvHeads).reshape(kvHeads, -1, t.size(2));

    private static Tensor Split(Tensor grouped, long count) => grouped.view(grouped.size(0), -1, count, grouped.size(2));

    private static Tensor Sums(Tensor sums, long start, long count, long rows) => sums.view(sums.size(0), -1, rows).narrow(2, start, count);
}
