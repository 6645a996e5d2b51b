using MiniSeq.Layers;
using TorchSharp.Modules;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class LoraAdapterTests
{
    private static LoraAdapter Adapter(long input, long output, double dropout = 0, long number = 0, ScalarType dtype = ScalarType.Float64)
    {
        using var scope = NewDisposeScope();
        Parameter New(params long[] shape) => (Parameter)new Parameter(randn(shape, dtype)).DetachFromDisposeScope();
        return new LoraAdapter(New(3, input), New(output, 3), 1.7, dropout, number);
    }

    [Theory]
    [InlineData(0, false)]
    [InlineData(0.4, true)]
    public void TheClosedFormsOfAProjectionAreAutogradsWithTheSameMask(double dropout, bool bias)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        using var projection = new Projection(7, 5, bias, ScalarType.Float64) { Adapter = Adapter(7, 5, dropout) };
        DropoutRows? rows = dropout > 0 ? new DropoutRows(11, 60) : null; // rows 60.. lie on both sides of a block of masks
        var (x, dy) = (randn(9, 7, dtype: ScalarType.Float64, requires_grad: true), randn(9, 5, dtype: ScalarType.Float64));
        var y = projection.forward(x, rows);
        autograd.backward([y], [dy]);
        var (wantX, want) = (x.grad!.clone(), GradientsOf(projection));
        ClearGradients(projection);

        using var noGrad = no_grad();
        var dx = zeros_like(x);
        foreach (var (start, count) in new[] { (0L, 1L), (1L, 6L), (7L, 2L) })
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var part = rows?.From(start);
            Close(projection.forward(At(x), part), At(y), 1e-12);
            projection.AccumulateGradients(At(x), At(dy), part);
            projection.AddInputGradient(At(dx), At(dy), part);
            Close(projection.InputGradient(At(dy), part), At(wantX), 1e-12);
        }
        Close(dx, wantX, 1e-12);
        foreach (var (name, gradient) in GradientsOf(projection)) Close(gradient, want[name], 1e-12);
    }

    [Fact]
    public void AProjectionWithAnAdapterIsThatOfItsSum()
    {
        using var scope = NewDisposeScope();
        using var projection = new Projection(7, 5, true, ScalarType.Float64) { Adapter = Adapter(7, 5) };
        var adapter = projection.Adapter!;
        Assert.Equal(["weight", "bias", "lora_A.weight", "lora_B.weight"], projection.named_parameters().Select(p => p.name));
        var sum = projection.Weight.detach() + (1.7 * adapter.B.detach().mm(adapter.A.detach()));
        var x = randn(2, 4, 7, dtype: ScalarType.Float64);
        var y = projection.call(x);
        Close(y, nn.functional.linear(x, sum, projection.Bias), 1e-12);
        projection.MergeAdapter();
        Close(projection.Weight, sum, 1e-12);
        Close(projection.call(x), y, 1e-12);
        Assert.Equal(["weight", "bias"], projection.named_parameters().Select(p => p.name));
    }

    [Fact]
    public void AnEmbeddingWithAnAdapterIsThatOfItsSum()
    {
        using var scope = NewDisposeScope();
        using var embedding = new TokenEmbedding(11, 4, ScalarType.Float64) { Adapter = Adapter(11, 4) };
        var adapter = embedding.Adapter!;
        var ids = tensor(new long[] { 3, 0, 3, 10, 7, 3 });
        var dx = randn(6, 4, dtype: ScalarType.Float64);
        var x = embedding.call(ids);
        autograd.backward([x], [dx]);
        var want = GradientsOf(embedding);
        ClearGradients(embedding);
        embedding.Backward(ids.narrow(0, 0, 2), dx.narrow(0, 0, 2));
        embedding.Backward(ids.narrow(0, 2, 4), dx.narrow(0, 2, 4));
        foreach (var (name, gradient) in GradientsOf(embedding)) Close(gradient, want[name], 1e-12);
        var sum = embedding.Weight.detach() + (1.7 * adapter.B.detach().mm(adapter.A.detach()).t());
        Close(x, sum.index_select(0, ids), 1e-12);
        embedding.MergeAdapter();
        Close(embedding.Weight, sum, 1e-12);
        Assert.Equal(["weight"], embedding.named_parameters().Select(p => p.name));
    }

    [Theory]
    [InlineData(1, true)]
    [InlineData(4, false)]
    [InlineData(0, true)]
    public void TheLossOfAnAdaptedHeadIsThePlainOnes(int chunk, bool frozen)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        using var head = new Projection(6, 13, true, ScalarType.Float64) { Adapter = Adapter(6, 13) };
        head.Weight.requires_grad = !frozen;
        head.Bias!.requires_grad = !frozen;
        var x = randn(11, 6, dtype: ScalarType.Float64, requires_grad: true);
        var labels = randint(0, 13, [11], ScalarType.Int64);
        labels[2] = -100;
        nn.functional.cross_entropy(head.call(x), labels, reduction: nn.Reduction.Sum).mul(-0.3).backward();
        var (wantX, want) = (x.grad!.clone(), GradientsOf(head));
        ClearGradients(head);
        x.grad = null;
        using (var loss = LinearCrossEntropy.Loss(x, head, labels, chunk)) (loss.LossSum * -0.3).backward();
        Close(x.grad, wantX, 1e-12);
        foreach (var (name, gradient) in GradientsOf(head)) Close(gradient, want[name], 1e-12);
        Assert.Equal(frozen, head.Weight.grad is null);
    }

    [Theory]
    [InlineData(0, 1)]
    [InlineData(0.3, 3)]
    [InlineData(0.3, 100)]
    public void AGatedMlpWithAdaptersIsThePlainOne(double dropout, int chunk)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(3);
        using var mlp = new GatedMlp(5, 11, bias: true, chunkSize: chunk, dtype: ScalarType.Float64);
        foreach (var p in mlp.parameters()) p.requires_grad = false;
        (mlp.GateProj.Adapter, mlp.UpProj.Adapter, mlp.DownProj.Adapter) = (Adapter(5, 11, dropout, 0), Adapter(5, 11, dropout, 1), Adapter(11, 5, dropout, 2));
        var (x, dy) = (randn(10, 5, dtype: ScalarType.Float64, requires_grad: true), randn(10, 5, dtype: ScalarType.Float64));
        DropoutRows? rows = dropout > 0 ? new DropoutRows(4, 0) : null;
        var plain = mlp.DownProj.forward(nn.functional.silu(mlp.GateProj.forward(x, rows)) * mlp.UpProj.forward(x, rows), rows);
        autograd.backward([plain], [dy]);
        var (wantX, want) = (x.grad!.clone(), GradientsOf(mlp));
        ClearGradients(mlp);
        x.grad = null;
        if (rows is null)
        {
            var y = mlp.call(x); // called like any module it drops nothing
            autograd.backward([y], [dy]);
            Close(y, plain, 1e-12);
            Close(x.grad, wantX, 1e-12);
        }
        else
        {
            using var noGrad = no_grad();
            Chunking.ForEach(10, chunk, (start, count) =>
            {
                Tensor At(Tensor t) => t.narrow(0, start, count);
                Close(mlp.ForwardChunk(At(x), dropout: rows?.From(start)), At(plain), 1e-12);
                Close(mlp.BackwardChunk(At(x), At(dy), dropout: rows?.From(start)), At(wantX), 1e-12);
            });
        }
        foreach (var (name, gradient) in GradientsOf(mlp))
        {
            Assert.Equal(name.Contains("lora"), gradient is not null);
            Close(gradient, want[name], 1e-12);
        }
    }

    [Fact]
    public void AMaskDependsOnSeedModuleRowAndColumnAlone()
    {
        using var scope = NewDisposeScope();
        Tensor Mask(long seed, long module, long first, long rows, double p = 0.3)
        {
            var mask = ones(rows, 50);
            new DropoutRows(seed, first).Mask_(mask, p, module);
            return mask;
        }
        var all = Mask(1, 2, 0, 300);
        Close(Mask(1, 2, 77, 100), all.narrow(0, 77, 100), 0);
        Assert.True(Difference(Mask(2, 2, 0, 300), all) > 0);
        Assert.True(Difference(Mask(1, 3, 0, 300), all) > 0);
        Assert.Equal(all.numel(), all.eq(0).sum().item<long>() + all.eq(1).sum().item<long>());
        Close(Mask(1, 2, 0, 300, p: 0), ones(300, 50), 0);
        var first = DropoutRows.NewPass();
        Assert.NotEqual(first, DropoutRows.NewPass());
    }

    // As far from independent draws as independent draws are: means, neighbours, and four corners of a rectangle.
    [Theory]
    [InlineData(0.05)]
    [InlineData(0.5)]
    public void MasksLookIndependent(double p)
    {
        using var scope = NewDisposeScope();
        var mask = ones(600, 1024, ScalarType.Float64);
        new DropoutRows(12, 0).Mask_(mask, p, 0);
        var d = (mask - (1 - p)) / Math.Sqrt(p * (1 - p));
        static double Deviations(Tensor t) => Math.Abs(t.mean().item<double>()) * Math.Sqrt(t.numel());
        var rows = d.narrow(0, 0, 300) * d.narrow(0, 300, 300);
        var columns = d.narrow(1, 0, 512) * d.narrow(1, 512, 512);
        var corners = rows.narrow(1, 0, 512) * rows.narrow(1, 512, 512);
        foreach (var t in new[] { d, rows, columns, corners }) Assert.InRange(Deviations(t), 0, 4.5);
        Assert.InRange(d.mean([1]).pow(2).mean().item<double>() * 1024, 0.7, 1.3);
        Assert.InRange(d.mean([0]).pow(2).mean().item<double>() * 600, 0.75, 1.25);
    }

    [Fact]
    public void WhatDoesNotFitIsRefused()
    {
        using var projection = new Projection(7, 5);
        using var adapter = Adapter(6, 5);
        Assert.Contains("[r, 7]", Assert.Throws<ArgumentException>(() => projection.Adapter = adapter).Message);
        Assert.Null(projection.Adapter);
        Assert.Throws<ArgumentException>(() => new LoraAdapter(adapter.A, adapter.A, 1));
        Assert.Throws<ArgumentOutOfRangeException>(() => new LoraAdapter(adapter.A, adapter.B, 1, dropout: 1));
    }
}
