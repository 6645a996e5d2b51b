using MiniSeq.Training;
using TorchSharp.Modules;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class FusedAdamWTests
{
    [Fact]
    public void EqualsTorchSharpsOwnAndDecaysMatricesOnly()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        var (matrix, vector) = (new Parameter(randn(5, 4)), new Parameter(randn(4)));
        var (wantMatrix, wantVector) = (new Parameter(matrix.detach().clone()), new Parameter(vector.detach().clone()));
        var options = new TrainingOptions { WeightDecay = 0.1, AdamBeta1 = 0.8, AdamBeta2 = 0.95, AdamEpsilon = 1e-7 };
        using var ours = new FusedAdamW([matrix, vector], options);
        using var decayed = optim.AdamW([wantMatrix], 0.02, 0.8, 0.95, 1e-7, 0.1);
        using var free = optim.AdamW([wantVector], 0.02, 0.8, 0.95, 1e-7, 0);
        for (int step = 0; step < 5; step++)
        {
            foreach (var (a, b) in new[] { (matrix, wantMatrix), (vector, wantVector) })
            {
                a.grad = randn(a.shape);
                b.grad = a.grad.clone();
            }
            ours.Step(0.02);
            decayed.step();
            free.step();
        }
        Close(matrix, wantMatrix, 1e-6);
        Close(vector, wantVector, 1e-6);
        Assert.Equal((20 + 4) * 2 * 4 + 8, ours.StateBytes);
    }

    [Fact]
    public void ClippingScalesAllGradientsTogether()
    {
        using var scope = NewDisposeScope();
        var (a, b) = (new Parameter(zeros(2)), new Parameter(zeros(1)));
        (a.grad, b.grad) = (tensor([3f, 0]), tensor([4f]));
        using var optimizer = new FusedAdamW([a, b], new TrainingOptions());
        Assert.Equal(5, optimizer.ClipGradNorm(0), 1e-6);
        Assert.Equal(4, b.grad.item<float>());
        Assert.Equal(5, optimizer.ClipGradNorm(1), 1e-6);
        Assert.Equal(0.8f, b.grad.item<float>(), 1e-6f);
        Assert.Equal(1, optimizer.ClipGradNorm(1), 1e-6);
    }

    [Fact]
    public void AParameterWithoutAGradientIsLeftAlone()
    {
        using var scope = NewDisposeScope();
        var (a, b) = (new Parameter(ones(2)), new Parameter(ones(2)));
        using var optimizer = new FusedAdamW([a, b], new TrainingOptions());
        a.grad = ones(2);
        optimizer.Step(0.1);
        Assert.Equal(1, b[0].item<float>());
        Assert.Equal(0.9f, a[0].item<float>(), 1e-6f);
    }

    [Theory]
    [InlineData(LrSchedulerType.Linear, 0, 0.25)]
    [InlineData(LrSchedulerType.Linear, 2, 0.75)]
    [InlineData(LrSchedulerType.Linear, 3, 1)]
    [InlineData(LrSchedulerType.Linear, 8, 0.5)]
    [InlineData(LrSchedulerType.Cosine, 3, 1)]
    [InlineData(LrSchedulerType.Cosine, 8, 0.5)]
    [InlineData(LrSchedulerType.Constant, 12, 1)]
    public void LearningRateWarmsUpAndDecays(LrSchedulerType type, int step, double share) =>
        Assert.Equal(share * 2, new TrainingOptions { LearningRate = 2, LrSchedulerType = type, WarmupSteps = 3 }.LearningRateAt(step, 13), 1e-12);

    [Fact]
    public void OptionsOutsideTheirRangeAreNamed()
    {
        TrainingOptions[] wrong = [new() { NumTrainEpochs = 0 }, new() { MaxSteps = 0 }, new() { BatchSize = 0 }, new() { GradientAccumulationSteps = 0 }, new() { LearningRate = -1 },
            new() { LearningRate = double.NaN }, new() { WarmupSteps = -1 }, new() { WarmupRatio = 2 }, new() { WeightDecay = -1 }, new() { AdamBeta1 = 1 }, new() { AdamEpsilon = 0 },
            new() { MaxGradNorm = -1 }, new() { LoggingSteps = 0 }, new() { EvalSteps = 0 }, new() { EarlyStoppingPatience = 0 }];
        foreach (var options in wrong) Assert.Contains("must be", Assert.Throws<ArgumentOutOfRangeException>(options.Validate).Message);
        new TrainingOptions().Validate();
    }
}
