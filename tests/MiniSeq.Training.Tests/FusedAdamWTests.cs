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
        Assert.Equal((20 + 4) * 2 * 4, ours.StateBytes);
    }

    // The definition, in float64: weights after some steps of the given gradients.
    private static double[] Written(double[] weights, IEnumerable<float[]> gradients, double rate, double decay, TrainingOptions o)
    {
        var (w, m, v) = (weights.ToArray(), new double[weights.Length], new double[weights.Length]);
        foreach (var (step, g) in gradients.Index())
            for (int i = 0; i < w.Length; i++)
            {
                m[i] = (o.AdamBeta1 * m[i]) + ((1 - o.AdamBeta1) * g[i]);
                v[i] = (o.AdamBeta2 * v[i]) + ((1 - o.AdamBeta2) * g[i] * g[i]);
                double first = m[i] / (1 - Math.Pow(o.AdamBeta1, step + 1)), second = v[i] / (1 - Math.Pow(o.AdamBeta2, step + 1));
                w[i] -= (rate * decay * w[i]) + (rate * first / (Math.Sqrt(second) + o.AdamEpsilon));
            }
        return w;
    }

    private static float[] Values(Tensor t) => t.detach().to(ScalarType.Float32).contiguous().data<float>().ToArray();

    // Ends of a vector, of a block of the kernel, and none of them.
    private static readonly long[][] s_shapes = [[1], [7], [32], [3, 5], [41], [65536], [2, 32769], [3, 70001]];

    [Theory]
    [InlineData(ScalarType.Float32, OptimizerStateType.Float32, 2e-5)]
    [InlineData(ScalarType.BFloat16, OptimizerStateType.Float32, 2e-5)]
    [InlineData(ScalarType.Float32, OptimizerStateType.BFloat16, 0.1)]
    [InlineData(ScalarType.BFloat16, OptimizerStateType.BFloat16, 0.1)]
    [InlineData(ScalarType.Float64, OptimizerStateType.Float32, 1e-9)]
    [InlineData(ScalarType.Float64, OptimizerStateType.BFloat16, 0.1)]
    [InlineData(ScalarType.Float16, OptimizerStateType.Float32, 2e-5)]
    public void EqualsTheDefinitionInFloat64(ScalarType dtype, OptimizerStateType state, double tolerance)
    {
        const int Steps = 12;
        const double Rate = 0.01;
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        var options = new TrainingOptions { WeightDecay = 0.1, AdamBeta2 = 0.99, OptimizerState = state };
        foreach (var shape in s_shapes)
        {
            using var one = NewDisposeScope();
            var parameter = new Parameter(randn(shape, dtype));
            double[] start = parameter.detach().to(ScalarType.Float64).data<double>().ToArray();
            using var optimizer = new FusedAdamW([parameter], options);
            var gradients = new List<float[]>();
            for (int step = 0; step < Steps; step++)
            {
                parameter.grad = (randn(shape) + 0.5).to(dtype == ScalarType.Float64 ? dtype : ScalarType.Float32);
                gradients.Add(Values(parameter.grad));
                optimizer.Step(Rate);
            }
            var (want, got) = (Written(start, gradients, Rate, shape.Length > 1 ? 0.1 : 0, options), parameter.detach().to(ScalarType.Float64).data<double>().ToArray());
            // Against the length of the way; a 16-bit weight is rounded once more at its end.
            double digit = dtype == ScalarType.BFloat16 ? 1.0 / 256 : dtype == ScalarType.Float16 ? 1.0 / 2048 : 0;
            for (int i = 0; i < want.Length; i++) Assert.InRange(Math.Abs(got[i] - want[i]), 0, (tolerance * Rate * Steps) + (digit * Math.Abs(want[i])));
            long wide = dtype == ScalarType.Float64 ? 8 : 4, master = dtype is ScalarType.BFloat16 or ScalarType.Float16 ? 4 : 0;
            Assert.Equal(want.Length * ((2 * (state == OptimizerStateType.BFloat16 ? 2 : wide)) + master), optimizer.StateBytes);
        }
    }

    [Theory]
    [InlineData(ScalarType.Float32)]
    [InlineData(ScalarType.BFloat16)]
    [InlineData(ScalarType.Float64)] // libtorch's operator, as on a GPU
    public void ABFloat16SecondMomentDoesNotStandStill(ScalarType dtype)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(3);
        var parameter = new Parameter(zeros([1000], dtype));
        using var optimizer = new FusedAdamW([parameter], new TrainingOptions { OptimizerState = OptimizerStateType.BFloat16 });
        void Step(double rate)
        {
            using var one = NewDisposeScope();
            parameter.grad = ones([1000], dtype == ScalarType.Float64 ? dtype : ScalarType.Float32);
            optimizer.Step(rate);
        }
        for (int step = 0; step < 2000; step++) Step(0);
        Step(1);
        // The step is m / √v, each without bias; rounded to nearest, v stays near 0.25 in place of 0.86, and the step is nearly 2.
        var second = Values(parameter).Select(w => 1 / ((double)w * w)).ToList();
        Assert.Equal(1, second.Average(), 0.02);
        Assert.All(second, v => Assert.InRange(v, 0.7, 1.4));
    }

    [Fact]
    public void StochasticRoundingDependsOnTheSeedAndNotOnThreadsOrOrder()
    {
        using var scope = NewDisposeScope();
        int threads = get_num_threads();
        float[] Run(int seed, bool piecewise, int count)
        {
            set_num_threads(count);
            random.manual_seed(4);
            Parameter[] parameters = [new(zeros(3, 70001)), new(zeros(33))];
            using var optimizer = new FusedAdamW(parameters, new TrainingOptions { OptimizerState = OptimizerStateType.BFloat16, Seed = seed });
            for (int step = 0; step < 4; step++)
            {
                foreach (var p in parameters) p.grad = randn(p.shape);
                if (!piecewise) optimizer.Step(0.01);
                else foreach (var p in parameters.Reverse()) optimizer.StepAndFree([p], 0.01);
            }
            return [.. parameters.SelectMany(p => Values(p))];
        }
        try
        {
            var want = Run(1, false, 1);
            Assert.Equal(want, Run(1, false, 1));
            Assert.Equal(want, Run(1, true, 2));
            Assert.NotEqual(want, Run(2, false, 1));
        }
        finally
        {
            set_num_threads(threads);
        }
    }

    [Fact]
    public void ABFloat16WeightIsItsMasterRoundedAsLibtorchRounds()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(5);
        var start = randn(1000).to(ScalarType.BFloat16);
        var (narrow, wide) = (new Parameter(start.clone()), new Parameter(start.to(ScalarType.Float32)));
        using var optimizer = new FusedAdamW([narrow, wide], new TrainingOptions());
        for (int step = 0; step < 5; step++)
        {
            (narrow.grad, wide.grad) = (randn(1000), null);
            wide.grad = narrow.grad.clone();
            optimizer.Step(0.01);
        }
        Assert.True(narrow.eq(wide.to(ScalarType.BFloat16)).all().item<bool>());
    }

    [Fact]
    public void LayoutsOfParameterAndGradientDoNotMatter()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(6);
        var values = randn(6, 9);
        Parameter[] parameters = [new(values.clone()), new(values.clone()), new(values.t().contiguous().t())];
        using var optimizer = new FusedAdamW(parameters, new TrainingOptions());
        for (int step = 0; step < 3; step++)
        {
            var gradient = randn(6, 9);
            foreach (var p in parameters) p.grad = gradient.clone();
            parameters[1].grad = gradient.t().contiguous().t();
            optimizer.Step(0.01);
        }
        Assert.True(parameters[1].eq(parameters[0]).all().item<bool>());
        Close(parameters[2], parameters[0], 1e-6);
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
            new() { MaxGradNorm = -1 }, new() { LoggingSteps = 0 }, new() { EvalSteps = 0 }, new() { EarlyStoppingPatience = 0 },
            new() { OptimizerState = (OptimizerStateType)7 }];
        foreach (var options in wrong) Assert.Contains("must be", Assert.Throws<ArgumentOutOfRangeException>(options.Validate).Message);
        new TrainingOptions().Validate();
    }
}
