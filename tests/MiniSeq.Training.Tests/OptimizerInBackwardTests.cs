using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class OptimizerInBackwardTests
{
    private static readonly TrainingOptions s_options = new() { MaxSteps = 5, BatchSize = 3, LearningRate = 1e-2, WeightDecay = 0.1, MaxGradNorm = 0 };

    private static CausalLM Model(bool tied = false, ScalarType dtype = ScalarType.Float32, bool adapted = false, double eps = 1e-6)
    {
        random.manual_seed(1);
        var model = new CausalLM(DecoderConfig.Llama(40, 16, 24, 2, 2, 1, tied) with { InitializerRange = 0.2, RmsNormEps = eps }, dtype);
        if (adapted) model.AddAdapter(new LoraConfig { R = 4, LoraDropout = 0.1, TargetModules = ["q_proj", "down_proj", "embed_tokens", "lm_head"] });
        return model;
    }

    private static List<TokenSequence> Documents(int count)
    {
        var random = new Random(0);
        return [.. Enumerable.Range(0, count).Select(_ =>
        {
            long[] ids = [.. Enumerable.Range(0, random.Next(3, 12)).Select(_ => random.NextInt64(40))];
            return new TokenSequence(ids, [.. ids.Select((id, i) => i < 2 ? -100 : id)]);
        })];
    }

    private static Dictionary<string, float[]> Weights(CausalLM model) =>
        model.named_parameters().ToDictionary(p => p.name, p => p.parameter.to(ScalarType.Float32).data<float>().ToArray());

    private sealed class Norms : List<double>, IProgress<TrainingProgress>
    {
        public void Report(TrainingProgress value) => Add(value.GradNorm);
    }

    [Theory]
    [InlineData(false, ScalarType.Float32, false, OptimizerStateType.Float32)]
    [InlineData(true, ScalarType.Float32, false, OptimizerStateType.Float32)]
    [InlineData(false, ScalarType.BFloat16, false, OptimizerStateType.Float32)]
    [InlineData(true, ScalarType.BFloat16, false, OptimizerStateType.BFloat16)]
    [InlineData(false, ScalarType.Float32, true, OptimizerStateType.BFloat16)]
    [InlineData(true, ScalarType.BFloat16, true, OptimizerStateType.Float32)]
    public void TheWeightsAreThoseOfTheOrdinaryStep(bool tied, ScalarType dtype, bool adapted, OptimizerStateType state)
    {
        (Dictionary<string, float[]> Weights, Norms Norms) Run(bool inBackward)
        {
            using var model = Model(tied, dtype, adapted);
            var norms = new Norms();
            Trainer.Train(model, Documents(13), null, s_options with { OptimizerInBackward = inBackward, OptimizerState = state }, norms);
            Assert.All(model.parameters(), p => Assert.Null(p.grad));
            return (Weights(model), norms);
        }
        var (want, got) = (Run(false), Run(true));
        Assert.Equal(want.Weights, got.Weights); // to the bit
        Assert.Equal(want.Norms.Count, got.Norms.Count);
        foreach (var (a, b) in want.Norms.Zip(got.Norms)) Assert.Equal(a, b, 1e-5 * a);
        using var before = Model(tied, dtype, adapted);
        Assert.NotEqual(Weights(before), got.Weights);
    }

    [Fact]
    public void FrozenParametersStay()
    {
        using var model = Model();
        foreach (var (name, p) in model.named_parameters()) p.requires_grad = name.Contains("layers.1.mlp");
        var before = Weights(model);
        Trainer.Train(model, Documents(5), null, s_options with { OptimizerInBackward = true });
        foreach (var (name, values) in Weights(model)) Assert.Equal(!name.Contains("layers.1.mlp"), before[name].AsSpan().SequenceEqual(values));
    }

    [Fact]
    public void WhatNeedsAllGradientsIsRefused()
    {
        var options = new TrainingOptions { OptimizerInBackward = true };
        string both = Assert.Throws<ArgumentException>((options with { GradientAccumulationSteps = 4 }).Validate).Message;
        Assert.Contains("MaxGradNorm is 1", both);
        Assert.Contains("GradientAccumulationSteps is 4", both);
        Assert.DoesNotContain("MaxGradNorm is", Assert.Throws<ArgumentException>((options with { MaxGradNorm = 0, GradientAccumulationSteps = 4 }).Validate).Message);
        Assert.DoesNotContain("GradientAccumulationSteps is", Assert.Throws<ArgumentException>(options.Validate).Message);
        (options with { MaxGradNorm = 0 }).Validate();
    }

    [Fact]
    public void ANonFiniteLossChangesNoWeight()
    {
        using var model = Model();
        using (no_grad()) model.get_parameter("model.norm.weight")!.fill_(float.NaN);
        var before = Weights(model);
        var error = Assert.Throws<NotFiniteNumberException>(() => Trainer.Train(model, Documents(3), null, s_options with { OptimizerInBackward = true }));
        Assert.StartsWith("Step 1: the loss is NaN", error.Message);
        Assert.Contains("No step was made yet", error.Message);
        Assert.Equal(before, Weights(model));
        Assert.All(model.parameters(), p => Assert.Null(p.grad));
    }

    [Fact]
    public void ANonFiniteGradientBelowSaysThatWeightsAboveWereChanged()
    {
        // A hidden state next to nothing makes the first norm multiply its gradient by 1e20.
        using var model = Model(eps: 1e-40);
        using (no_grad()) model.get_parameter("model.embed_tokens.weight")!.mul_(1e-25);
        var before = Weights(model);
        var error = Assert.Throws<NotFiniteNumberException>(() => Trainer.Train(model, Documents(3), null, s_options with { OptimizerInBackward = true }));
        Assert.Contains("weights of later layers are already those of this step", error.Message);
        var after = Weights(model);
        Assert.NotEqual(before["lm_head.weight"], after["lm_head.weight"]);
        Assert.Equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]);
        Assert.All(model.parameters(), p => Assert.Null(p.grad));
    }

    [Fact]
    public void TheGradientsOfTheWholeModelNeverExistAtOnce()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        const int Layers = 6;
        long Peak(bool inBackward)
        {
            random.manual_seed(1);
            using var model = new CausalLM(DecoderConfig.Llama(64, 64, 512, Layers, 2, 1));
            long before = TensorMemory.LiveBytes;
            Trainer.Train(model, Documents(4), null, s_options with { OptimizerInBackward = inBackward, MaxSteps = 3, Compute = new ComputeOptions(Recompute: RecomputePolicy.Full) }, new Callback(p =>
            {
                if (p.Step < 3) TensorMemory.ResetPeak(); // the state is made in the first step
            }));
            return TensorMemory.PeakBytes - before;
        }
        long layer = 4 * ((3 * 64 * 512) + (3 * 64 * 64)); // bytes of a layer's gradients
        Assert.InRange(Peak(false) - Peak(true), (Layers - 2) * layer, (Layers + 1) * layer);
    }

    private sealed class Callback(Action<TrainingProgress> action) : IProgress<TrainingProgress>
    {
        public void Report(TrainingProgress value) => action(value);
    }
}
