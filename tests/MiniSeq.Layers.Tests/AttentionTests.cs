using MiniSeq.Layers;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class AttentionTests
{
    // softmax(scale · Q Kᵀ + causal) V, written out, for rows [n, heads, D] of one document.
    private static Tensor Written(Tensor q, Tensor k, Tensor v, double scale)
    {
        long groups = q.size(1) / k.size(1);
        k = k.repeat_interleave(groups, 1).transpose(0, 1);
        v = v.repeat_interleave(groups, 1).transpose(0, 1);
        var scores = q.transpose(0, 1).matmul(k.transpose(1, 2)) * scale;
        var mask = ones([q.size(0), q.size(0)], ScalarType.Bool).triu(1);
        return scores.masked_fill(mask, double.NegativeInfinity).softmax(-1).matmul(v).transpose(0, 1);
    }

    [Theory]
    [InlineData(4, 4, new long[] { 9 })]
    [InlineData(4, 2, new long[] { 9 })]
    [InlineData(6, 1, new long[] { 5, 1, 70 })]
    public void EqualsTheWrittenFormPerDocument(int heads, int kvHeads, long[] lengths)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(4);
        long rows = lengths.Sum();
        Tensor Leaf(int h) => randn(rows, h, 8, dtype: ScalarType.Float64, requires_grad: true);
        var (q, k, v) = (Leaf(heads), Leaf(kvHeads), Leaf(kvHeads));
        var upstream = randn(rows, heads, 8, dtype: ScalarType.Float64);
        var parts = new List<Tensor>();
        long start = 0;
        foreach (long n in lengths)
        {
            parts.Add(Written(q.narrow(0, start, n), k.narrow(0, start, n), v.narrow(0, start, n), 0.3));
            start += n;
        }
        var want = cat(parts, 0);
        autograd.backward([want], [upstream]);

        using var got = Attention.Forward(q, k, v, lengths, 0.3);
        Close(got.Output, want, 1e-12);
        var (dq, dk, dv) = Attention.Backward(upstream, q.detach(), k.detach(), v.detach(), got, lengths, 0.3);
        Close(dq, q.grad, 1e-12);
        Close(dk, k.grad, 1e-12);
        Close(dv, v.grad, 1e-12);

        // The form for devices without the kernel: no log-sum-exp is kept and a graph gives the gradients.
        var (gq, gk, gv) = Attention.Backward(upstream, q.detach(), k.detach(), v.detach(), got with { LogSumExp = [.. lengths.Select(_ => (Tensor?)null)] }, lengths, 0.3);
        Close(gq, q.grad, 1e-12);
        Close(gk, k.grad, 1e-12);
        Close(gv, v.grad, 1e-12);
    }

    [Theory]
    [InlineData(null, null)]
    [InlineData(6L, null)]
    [InlineData(null, 2.0)]
    public void SomeQueriesGiveTheLastRowsOfTheWhole(long? window, double? softcap)
    {
        using var scope = NewDisposeScope();
        long[] lengths = [9, 4, 7, 5], asked = [3, 4, 0, 1];
        Tensor Random(int heads) => randn(25, heads, 8, dtype: ScalarType.Float64);
        var (q, k, v, dy) = (Random(4), Random(2), Random(2), Random(4));
        var rows = tensor(new long[] { 6, 7, 8, 9, 10, 11, 12, 24 });
        Tensor Last(Tensor t) => t.index_select(0, rows);
        using var all = Attention.Forward(q, k, v, lengths, 0.3, window, softcap);
        var masked = zeros_like(dy).index_copy_(0, rows, Last(dy));
        var (dq, dk, dv) = Attention.Backward(masked, q, k, v, all, lengths, 0.3, window, softcap);

        using var some = Attention.Forward(Last(q), k, v, lengths, 0.3, window, softcap, asked);
        var (sq, sk, sv) = Attention.Backward(Last(dy), Last(q), k, v, some, lengths, 0.3, window, softcap, asked);
        Close(some.Output, Last(all.Output), 1e-12);
        Close(sq, Last(dq), 1e-12);
        Close(sk, dk, 1e-12);
        Close(sv, dv, 1e-12);
    }

    [Fact]
    public void WithCacheEqualsTheLastRowOfTheWhole()
    {
        using var scope = NewDisposeScope();
        var (q, k, v) = (randn(7, 4, 8), randn(7, 2, 8), randn(7, 2, 8));
        var all = Attention.WithCache(q, k, v, 0.5);
        Close(Attention.WithCache(q.narrow(0, 6, 1), k, v, 0.5), all.narrow(0, 6, 1), 1e-6);
        Assert.Throws<ArgumentException>(() => Attention.WithCache(q.narrow(0, 4, 3), k, v, 0.5));
    }

    [Theory]
    [InlineData(3L, null)]
    [InlineData(null, 2.0)]
    [InlineData(3L, 2.0)]
    [InlineData(7L, null)]
    public void WithCacheKeepsWindowAndCap(long? window, double? softcap)
    {
        using var scope = NewDisposeScope();
        var (q, k, v) = (randn(7, 4, 8), randn(7, 2, 8), randn(7, 2, 8));
        Tensor Heads(Tensor t) => t.unsqueeze(0).transpose(1, 2);
        var plain = Attention.Plain(Heads(q), Heads(k), Heads(v), 0.5, window, softcap).transpose(1, 2).squeeze(0);
        Close(Attention.WithCache(q, k, v, 0.5, window, softcap), plain, 1e-6);
        Close(Attention.WithCache(q.narrow(0, 6, 1), k, v, 0.5, window, softcap), plain.narrow(0, 6, 1), 1e-6);
    }

    // Large scores, where rounding them to 16 bits would cost several times as much.
    [Fact]
    public void TilesInBFloat16AreAsExactAsTheFlashKernel()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        var (q, k, v, dy) = (randn(1000, 4, 64) * 4, randn(1000, 2, 64), randn(1000, 2, 64), randn(1000, 4, 64));
        Tensor[] Run(ScalarType dtype, long? window)
        {
            Tensor To(Tensor t) => t.to(ScalarType.BFloat16).to(dtype); // the same numbers in each type
            var forward = Attention.Forward(To(q), To(k), To(v), [1000], 0.125, window);
            var (dq, dk, dv) = Attention.Backward(To(dy), To(q), To(k), To(v), forward, [1000], 0.125, window);
            return [forward.Output, dq, dk, dv];
        }
        double Off(Tensor got, Tensor want) => ((got.to(ScalarType.Float64) - want).norm() / want.norm()).item<double>();
        var (truth, flash, tiled) = (Run(ScalarType.Float64, null), Run(ScalarType.BFloat16, null), Run(ScalarType.BFloat16, 999));
        for (int i = 0; i < truth.Length; i++) Assert.InRange(Off(tiled[i], truth[i]), 0, 1.6 * Off(flash[i], truth[i]));
    }

    [Fact]
    public void MemoryIsLinearInTheSequence()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        long Peak(long rows)
        {
            using var scope = NewDisposeScope();
            var (q, k, v) = (randn(rows, 2, 16), randn(rows, 1, 16), randn(rows, 1, 16));
            long before = TensorMemory.LiveBytes;
            TensorMemory.ResetPeak();
            using var forward = Attention.Forward(q, k, v, [rows], 0.25);
            Attention.Backward(forward.Output, q, k, v, forward, [rows], 0.25);
            return TensorMemory.PeakBytes - before;
        }
        Peak(64); // code and threads
        Assert.InRange((double)Peak(4096) / Peak(1024), 0, 4.4);
    }

    [Fact]
    public void RotaryTurnsAndTurnsBack()
    {
        using var scope = NewDisposeScope();
        using var rotary = new RotaryEmbedding(8, 10000, ScalarType.Float64);
        var x = randn(5, 3, 8, dtype: ScalarType.Float64);
        var (cos, sin) = rotary.Rows(tensor([0L, 1, 2, 0, 1]), 3);
        var turned = x.clone();
        RotaryEmbedding.Rotate_(turned, cos, sin);
        Close(turned, RotaryEmbedding.Rotate(x, cos, sin), 1e-15);
        Close(turned[0], x[0], 1e-15); // position 0 is not turned
        RotaryEmbedding.Rotate_(turned, cos, sin.neg());
        Close(turned, x, 1e-7); // cos² + sin² = 1 to float32, in which the angles are formed
        Assert.Throws<ArgumentException>(() => new RotaryEmbedding(7, 10000));
    }

    [Fact]
    public void RmsNormBackwardEqualsAutograd()
    {
        using var scope = NewDisposeScope();
        using var norm = new RmsNorm(6, 1e-5, ScalarType.Float64);
        using (no_grad()) norm.Weight.normal_();
        var x = randn(7, 6, dtype: ScalarType.Float64, requires_grad: true);
        var upstream = randn(7, 6, dtype: ScalarType.Float64);
        autograd.backward([norm.call(x)], [upstream]);
        var want = norm.Weight.grad!.clone();
        norm.Weight.grad = null;
        Close(norm.Backward(x.detach(), upstream), x.grad, 1e-12);
        Close(norm.Weight.grad, want, 1e-12);
    }
}
