using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

/// <summary>Plain forms and comparisons that the tests of a layer share.</summary>
internal static class Reference
{
    /// <summary>Largest |a − b| over the largest |b| (or 1, if b is smaller): what a tolerance is held against.</summary>
    public static double Difference(Tensor? a, Tensor? b)
    {
        if (a is null || b is null) return a is null && b is null ? 0 : double.PositiveInfinity;
        using var scope = NewDisposeScope();
        if (!a.shape.AsSpan().SequenceEqual(b.shape)) return double.PositiveInfinity;
        if (b.numel() == 0) return 0;
        var wide = b.to(ScalarType.Float64);
        double scale = Math.Max(wide.abs().max().item<double>(), 1e-3);
        double difference = (a.to(ScalarType.Float64) - wide).abs().max().item<double>() / scale;
        return double.IsNaN(difference) ? double.PositiveInfinity : difference;
    }

    public static void Close(Tensor? a, Tensor? b, double tolerance) =>
        Assert.True(Difference(a, b) <= tolerance, $"differs by {Difference(a, b):E2}, tolerance {tolerance:E1}");

    public static Tensor PlainMlp(GatedMlp mlp, Tensor x, Activation activation)
    {
        var gate = mlp.GateProj.call(x);
        var act = activation == Activation.Silu ? nn.functional.silu(gate) : nn.functional.gelu(gate, TorchSharp.Modules.GELU.Approximate.tanh);
        return mlp.DownProj.call(act * mlp.UpProj.call(x));
    }

    /// <summary>Graph nodes that are alive, without those of earlier tests that only wait for the garbage collector.</summary>
    public static int AliveNodes()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return AutogradNode.AliveCount;
    }

    public static void ClearGradients(nn.Module module)
    {
        foreach (var p in module.parameters()) p.grad = null;
    }

    public static Dictionary<string, Tensor?> GradientsOf(nn.Module module) =>
        module.named_parameters().ToDictionary(p => p.name, p => p.parameter.grad?.clone());
}
