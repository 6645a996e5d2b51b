using MiniSeq.Layers;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class GatedMlpTests
{
    [Theory]
    [InlineData(Activation.Silu, false, 1)]
    [InlineData(Activation.Silu, true, 3)]
    [InlineData(Activation.GeluTanh, false, 4)]
    [InlineData(Activation.GeluTanh, true, 100)]
    public void ChunkedEqualsPlain(Activation activation, bool bias, int chunk)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        using var mlp = new GatedMlp(5, 11, activation, bias, chunk, ScalarType.Float64);
        var x = randn(2, 5, 5, dtype: ScalarType.Float64, requires_grad: true);
        var upstream = randn(2, 5, 5, dtype: ScalarType.Float64);

        var plain = PlainMlp(mlp, x, activation);
        autograd.backward([plain], [upstream]);
        var (wantX, want) = (x.grad!.clone(), GradientsOf(mlp));
        ClearGradients(mlp);
        x.grad = null;

        var chunked = mlp.call(x);
        autograd.backward([chunked], [upstream]);
        Close(chunked, plain, 1e-12);
        Close(x.grad, wantX, 1e-12);
        foreach (var (name, gradient) in GradientsOf(mlp)) Close(gradient, want[name], 1e-12);
    }

    [Fact]
    public void WeightGradientsAccumulateIntoTheExistingGrad()
    {
        using var scope = NewDisposeScope();
        using var mlp = new GatedMlp(4, 6, chunkSize: 2);
        var x = randn(5, 4);
        mlp.call(x).sum().backward();
        var once = GradientsOf(mlp);
        mlp.call(x).sum().backward();
        foreach (var (name, gradient) in GradientsOf(mlp)) Close(gradient, once[name]! * 2, 1e-6);
    }

    [Fact]
    public void FrozenWeightsGetNoGradientAndTheOthersKeepTheirs()
    {
        using var scope = NewDisposeScope();
        using var mlp = new GatedMlp(4, 6, chunkSize: 2);
        mlp.UpProj.Weight.requires_grad = false;
        mlp.call(randn(5, 4)).sum().backward();
        Assert.Null(mlp.UpProj.Weight.grad);
        Assert.NotNull(mlp.GateProj.Weight.grad);
        Assert.NotNull(mlp.DownProj.Weight.grad);
    }

    [Fact]
    public void BFloat16WeightsAccumulateInFloat32()
    {
        using var scope = NewDisposeScope();
        using var mlp = new GatedMlp(8, 16, chunkSize: 2, dtype: ScalarType.BFloat16);
        mlp.call(randn(6, 8).bfloat16()).sum().backward();
        Assert.Equal(ScalarType.Float32, mlp.GateProj.Weight.grad!.dtype);
    }

    [Fact]
    public void AWrongWidthIsRefusedByName()
    {
        using var mlp = new GatedMlp(4, 6);
        using var x = randn(5, 3);
        var error = Assert.Throws<ArgumentException>(() => mlp.call(x));
        Assert.Contains("[.., 4]", error.Message);
        Assert.Throws<ArgumentOutOfRangeException>(() => new GatedMlp(4, 6, chunkSize: -1));
    }

    [Fact]
    public void ParameterNamesAreHuggingFaces()
    {
        using var mlp = new GatedMlp(4, 6, bias: true);
        Assert.Equal(["gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"], mlp.state_dict().Keys);
    }
}
