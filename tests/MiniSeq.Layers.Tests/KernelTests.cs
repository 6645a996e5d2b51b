using MiniSeq.Layers;
using TorchSharp.Modules;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

/// <summary>What runs in kernels of our own where the CPU multiplies bfloat16, and on libtorch's operators elsewhere, against float64.</summary>
public sealed class KernelTests
{
    private static Tensor Random(params long[] shape) => randn(shape).to(ScalarType.BFloat16);

    private static Tensor Exact(Tensor t) => t.to(ScalarType.Float64);

    [Theory]
    [InlineData(1, 1, 2, 2, 64, null, null)]
    [InlineData(15, 15, 2, 2, 64, null, null)]     // too few for the kernel
    [InlineData(16, 16, 2, 1, 16, null, null)]
    [InlineData(128, 128, 4, 4, 64, null, null)]   // one tile
    [InlineData(129, 129, 6, 2, 48, null, null)]
    [InlineData(700, 1300, 8, 2, 64, null, null)]  // the last rows only, heads that share keys
    [InlineData(300, 900, 6, 2, 128, 100, null)]
    [InlineData(600, 600, 5, 1, 256, 64, null)]    // five heads on one
    [InlineData(513, 513, 3, 1, 80, null, 5.0)]
    [InlineData(900, 900, 8, 8, 64, 333, 30.0)]
    [InlineData(40, 40, 2, 2, 64, 1, null)]        // a token sees itself
    [InlineData(40, 40, 2, 2, 20, null, null)]     // a width that is no multiple of 16
    public void AttentionEqualsFloat64(int queries, int rows, int heads, int keyHeads, int width, int? window, double? softcap)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        var (q, k, v, dy) = (Random(queries, heads, width) * 2, Random(rows, keyHeads, width), Random(rows, keyHeads, width), Random(queries, heads, width));
        long[] lengths = [rows], asked = [queries];
        double scale = 1 / Math.Sqrt(width);
        var got = Attention.Forward(q, k, v, lengths, scale, window, softcap, asked);
        var (dq, dk, dv) = Attention.Backward(dy, q, k, v, got, lengths, scale, window, softcap, asked);
        var want = Attention.Forward(Exact(q), Exact(k), Exact(v), lengths, scale, window, softcap, asked);
        var (wantDq, wantDk, wantDv) = Attention.Backward(Exact(dy), Exact(q), Exact(k), Exact(v), want, lengths, scale, window, softcap, asked);
        Near(got.Output, want.Output);
        Near(dv, wantDv);
        if (rows == 1 || window == 1) return; // one key: its probability is 1 whatever the query
        Near(dq, wantDq);
        Near(dk, wantDk);

        static void Near(Tensor got, Tensor want) => Close(got.to(ScalarType.Float64), want, 0.02 * want.abs().max().item<double>());
    }

    [Fact]
    public void AttentionOfADamagedModelIsNotANumber()
    {
        using var scope = NewDisposeScope();
        var (q, k, v) = (Random(40, 2, 64), Random(40, 2, 64), Random(40, 2, 64));
        k[30, 1, 5] = float.NaN;
        using var y = Attention.Forward(q, k, v, [40], 0.1);
        Assert.True(y.Output.isnan().any().item<bool>());
        Assert.False(y.Output.narrow(0, 0, 30).isnan().any().item<bool>());
    }

    [Theory]
    [InlineData(1, 1, 1)]
    [InlineData(3, 5, 7)]
    [InlineData(33, 130, 17)]
    [InlineData(512, 600, 300)]
    [InlineData(1100, 129, 257)]
    public void AWeightsGradientIsASumOfProducts(int rows, int m, int n)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        var (a, b, sum) = (Random(rows, m), Random(rows, n), randn(m, n));
        var want = Exact(sum) + Exact(a).t().mm(Exact(b));
        Gradients.AddProduct(sum, a, b);
        // Float32 sums in the kernel; elsewhere each block of products is rounded to bfloat16 first.
        Close(Exact(sum), want, 0.01 * want.abs().max().item<double>());
        using var weight = new Parameter(empty(m, n, dtype: ScalarType.BFloat16));
        foreach (int count in new[] { 0, rows, 0 }) Gradients.AccumulateProduct(weight, a.narrow(0, 0, count), b.narrow(0, 0, count)); // the first makes the gradient
        Close(Exact(weight.grad!), Exact(a).t().mm(Exact(b)), 0.01 * want.abs().max().item<double>());
        using var written = new Parameter(empty(m, n, dtype: ScalarType.BFloat16));
        Gradients.AccumulateProduct(written, a, b);
        Assert.Equal(0, (written.grad! - weight.grad!).abs().max().item<float>());
        // A column of a wider matrix is no contiguous tensor.
        var wide = zeros(m, n + 2);
        Gradients.AddProduct(wide.narrow(1, 1, n), a, b);
        Assert.Equal(0, wide.select(1, 0).abs().max().item<float>());
    }

    [Theory]
    [InlineData(64, 512, 16)]
    [InlineData(257, 8224, 272)]
    [InlineData(600, 4128, 256)]
    [InlineData(63, 512, 16)]   // too few rows for the kernel
    [InlineData(64, 510, 16)]   // too few terms
    public void AHeadsInputGradientEqualsFloat64(int rows, int vocabulary, int width)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(3);
        using var head = new Projection(width, vocabulary, dtype: ScalarType.BFloat16);
        var dLogits = Random(rows, vocabulary);
        var want = Exact(dLogits).mm(Exact(head.Weight));
        Close(Exact(head.InputGradient(dLogits)), want, 0.005 * want.abs().max().item<double>());
    }

    [Theory]
    [InlineData(1, 1)]
    [InlineData(5, 15)]
    [InlineData(70, 1003)]
    public void CrossEntropyAndItsGradientEqualFloat64(int rows, int vocabulary)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(3);
        using var head = new Projection(8, vocabulary, dtype: ScalarType.BFloat16);
        using var exact = new Projection(new TorchSharp.Modules.Parameter(Exact(head.Weight.detach())));
        var (x, labels) = (Random(rows, 8) * 4, randint(0, vocabulary, [rows], ScalarType.Int64));
        var (loss, dx) = LinearCrossEntropy.Chunk(x, head, labels, 0.5);
        var (wantLoss, wantDx) = LinearCrossEntropy.Chunk(Exact(x), exact, labels, 0.5);
        Assert.Equal(wantLoss.item<double>(), loss.item<double>(), 0.02 * rows);
        Close(Exact(dx!), wantDx, 0.03 * Math.Max(0.1, wantDx!.abs().max().item<double>()));
        Close(Exact(head.Weight.grad!), exact.Weight.grad, 0.03 * Math.Max(0.1, exact.Weight.grad!.abs().max().item<double>()));
        Assert.Equal(loss.item<double>(), LinearCrossEntropy.Chunk(x, head, labels, null).LossSum.item<double>());
    }

    [Fact]
    public void AnOnlyTokenHasNoGradient()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(6);
        using var head = new Projection(8, 1, dtype: ScalarType.BFloat16);
        var (loss, dx) = LinearCrossEntropy.Chunk(Random(50, 8), head, zeros(50, ScalarType.Int64), 0.01);
        Assert.Equal((0.0, 0f), (loss.item<double>(), dx!.to(ScalarType.Float32).abs().max().item<float>()));
        Assert.Equal(0f, head.Weight.grad!.abs().max().item<float>());
    }

    [Theory]
    [InlineData(ScalarType.Float64, 1e-12)]
    [InlineData(ScalarType.BFloat16, 0.02)]
    public void AFilterThatLeavesOutNothingThatCountsChangesNothing(ScalarType dtype, double tolerance)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(4);
        using var head = new Projection(6, 40, dtype: dtype);
        using (no_grad()) head.Weight.narrow(0, 10, 30).fill_(-100); // with x > 0 these 30 have no probability
        var (x, labels) = ((rand(9, 6) + 1).to(dtype), randint(0, 10, [9], ScalarType.Int64));
        var (_, want) = LinearCrossEntropy.Chunk(x, head, labels, 1);
        var wantWeight = head.Weight.grad!.clone();
        head.Weight.grad = null;
        var (loss, got) = LinearCrossEntropy.Chunk(x, head, labels, 1, gradientFilter: 1.0 / 4096);
        Close(Exact(got!), Exact(want!), tolerance);
        Close(Exact(head.Weight.grad!), Exact(wantWeight), tolerance);
        Assert.Equal(0, Exact(head.Weight.grad!).narrow(0, 10, 30).abs().max().item<double>());
        Assert.True(loss.item<double>() > 0);
    }

    [Fact]
    public void AFilterMayLeaveOutEverything()
    {
        using var scope = NewDisposeScope();
        using var head = new Projection(16, 64, dtype: ScalarType.BFloat16);
        using (no_grad()) head.Weight.zero_().select(0, 3).fill_(100); // the label is certain
        var (_, dx) = LinearCrossEntropy.Chunk(ones(4, 16, dtype: ScalarType.BFloat16), head, full([4], 3L), 1, gradientFilter: 1.0 / 4096);
        Assert.Equal((0f, 0f), (dx!.to(ScalarType.Float32).abs().max().item<float>(), head.Weight.grad!.abs().max().item<float>()));
    }

    [Fact]
    public void ALabelOutsideTheVocabularyIsAnError()
    {
        using var scope = NewDisposeScope();
        using var head = new Projection(16, 64, dtype: ScalarType.BFloat16);
        foreach (long label in new[] { -100L, 64 })
            Assert.ThrowsAny<Exception>(() => LinearCrossEntropy.Chunk(Random(4, 16), head, full([4], label), 1));
        Assert.ThrowsAny<Exception>(() => LinearCrossEntropy.Chunk(Random(4, 16), head, zeros(4, ScalarType.Int32), 1));
    }

    [Fact]
    public void AFloat32NormTakesBFloat16Rows()
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        var x = Random(5, 32);
        Close(Exact(new RmsNorm(32).forward(x)), Exact(new RmsNorm(32, dtype: ScalarType.Float64).forward(Exact(x))), 0.02);
    }

    [Fact]
    public void AttentionTakesPermutedTensors()
    {
        using var scope = NewDisposeScope();
        var (q, k, v, dy) = (Random(2, 40, 64), Random(2, 40, 64), Random(2, 40, 64), Random(2, 40, 64));
        Tensor[] Gradients(Func<Tensor, Tensor> rows)
        {
            var result = Attention.Forward(rows(q), rows(k), rows(v), [40], 0.1);
            var (dq, dk, dv) = Attention.Backward(rows(dy), rows(q), rows(k), rows(v), result, [40], 0.1);
            return [dq, dk, dv];
        }
        foreach (var (got, want) in Gradients(t => t.transpose(0, 1)).Zip(Gradients(t => t.transpose(0, 1).contiguous()))) Close(Exact(got), Exact(want), 1e-6);
    }

    [Fact]
    public void KeysThatDoNotFitTheQueriesAreAnError()
    {
        using var scope = NewDisposeScope();
        foreach (var dtype in new[] { ScalarType.BFloat16, ScalarType.Float32 })
        {
            Tensor Of(params long[] shape) => randn(shape).to(dtype);
            var (q, k, v) = (Of(40, 4, 64), Of(40, 4, 64), Of(40, 4, 64));
            var y = Attention.Forward(q, k, v, [40], 0.1);
            Refused($"q {dtype} [40, 6, 64]", () => Attention.Forward(Of(40, 6, 64), k, v, [40], 0.1));
            Refused($"v {dtype} [40, 4, 32]", () => Attention.Forward(q, k, Of(40, 4, 32), [40], 0.1));
            Refused("over 39 rows", () => Attention.Forward(q, k, v, [39], 0.1));
            Refused("39 queries", () => Attention.Forward(q, k, v, [40], 0.1, queries: [39]));
            Refused("Float64", () => Attention.Forward(q, k.to(ScalarType.Float64), v, [40], 0.1));
            Refused($"dy {dtype} [39, 4, 64]", () => Attention.Backward(Of(39, 4, 64), q, k, v, y, [40], 0.1));
            Refused($"k {dtype} [40, 3, 64]", () => Attention.WithCache(q, Of(40, 3, 64), v, 0.1));
        }

        static void Refused(string part, Action body) => Assert.Contains(part, Assert.Throws<ArgumentException>(body).Message);
    }

    [Fact]
    public void WhatAFilterLeavesOutIsBelowItsThreshold()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(5);
        using var head = new Projection(6, 400, dtype: ScalarType.Float64);
        using (no_grad()) head.Weight.mul_(20);
        var (x, labels) = (randn(3, 6, dtype: ScalarType.Float64), randint(0, 400, [3], ScalarType.Int64));
        LinearCrossEntropy.Chunk(x, head, labels, 1);
        var exact = head.Weight.grad!.clone();
        head.Weight.grad = null;
        LinearCrossEntropy.Chunk(x, head, labels, 1, gradientFilter: 1e-3);
        var off = (head.Weight.grad! - exact).abs();
        Assert.True((head.Weight.grad!.abs().sum(dim: 1) > 0).sum().item<long>() is > 3 and < 200);
        Assert.True(off.max().item<double>() <= 3 * 1e-3 * x.abs().max().item<double>());
        Assert.True(off.max().item<double>() > 0);
    }
}
