using MiniSeq.Layers;
using MiniSeq.Models;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class MemoryPlanTests
{
    private static readonly DecoderConfig s_llama = DecoderConfig.Llama(4096, 256, 704, 3, 4, 2);

    private static readonly Dictionary<string, DecoderConfig> s_models = new()
    {
        ["llama"] = s_llama,
        ["one layer"] = s_llama with { NumHiddenLayers = 1 },
        ["large vocabulary"] = DecoderConfig.Llama(32000, 128, 352, 2, 4, 4),
        ["tied, biases"] = s_llama with { TieWordEmbeddings = true, QkvBias = true, OutputBias = true, MlpBias = true },
        ["window"] = s_llama with { SlidingWindow = 256 },
        ["q/k norms"] = s_llama with { QkNorm = true, HeadDim = 128 },
        ["gemma 2"] = s_llama with
        {
            SlidingWindow = 256,
            LayerTypes = [LayerType.SlidingAttention, LayerType.FullAttention, LayerType.SlidingAttention],
            AttnLogitSoftcapping = 50,
            FinalLogitSoftcapping = 30,
            PostNorms = true,
            RmsNormUnitOffset = true,
            ScaleEmbeddings = true,
            TieWordEmbeddings = true,
            HiddenAct = Activation.GeluTanh,
        },
    };

    [Theory]
    [InlineData("llama", 1024, 1, 256, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("llama", 1600, 1, 256, RecomputePolicy.Full, ScalarType.BFloat16)]
    [InlineData("llama", 1200, 1, 64, RecomputePolicy.KeepAttention, ScalarType.Float32)]
    [InlineData("llama", 1000, 1, 256, RecomputePolicy.None, ScalarType.Float32)]
    [InlineData("llama", 1000, 0.05, 256, RecomputePolicy.None, ScalarType.BFloat16)]
    [InlineData("llama", 1200, 1, 256, RecomputePolicy.Auto, ScalarType.Float32)]
    [InlineData("llama", 1024, 1, 256, RecomputePolicy.Full, ScalarType.Float64)]
    [InlineData("llama", 700, 0.05, 256, RecomputePolicy.Full, ScalarType.Float32, 0, 3)]
    [InlineData("llama", 1200, 1, 256, RecomputePolicy.Full, ScalarType.BFloat16, 16)]
    [InlineData("llama", 1200, 1, 256, RecomputePolicy.KeepAttention, ScalarType.Float32, 64)]
    [InlineData("one layer", 2400, 0.05, 256, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("one layer", 1200, 1, Chunking.Auto, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("large vocabulary", 1024, 1, 512, RecomputePolicy.Full, ScalarType.BFloat16)]
    [InlineData("large vocabulary", 1024, 1, Chunking.Auto, RecomputePolicy.Auto, ScalarType.BFloat16)]
    [InlineData("tied, biases", 1200, 1, 256, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("window", 1200, 1, 256, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("window", 1000, 1, 128, RecomputePolicy.KeepAttention, ScalarType.BFloat16)]
    [InlineData("q/k norms", 1000, 1, 512, RecomputePolicy.Full, ScalarType.BFloat16)]
    [InlineData("gemma 2", 1000, 1, 256, RecomputePolicy.Full, ScalarType.Float32)]
    [InlineData("gemma 2", 1000, 0.05, 256, RecomputePolicy.KeepAttention, ScalarType.BFloat16)]
    public void ThePlanPredictsThePeak(string name, int length, double labelled, int chunk, RecomputePolicy policy, ScalarType dtype, int rank = 0, int documents = 1)
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        long empty = Live();
        using var model = new CausalLM(s_models[name], dtype);
        if (rank > 0) model.AddAdapter(new LoraConfig { R = rank });
        var options = new ComputeOptions(chunk, policy, 24L << 20);
        var (shape, batch) = Batch(length, labelled, documents);
        void Step()
        {
            using var made = batch();
            model.ForwardBackward(made, 1, options).Dispose();
        }

        var training = new TrainingMemory { Adapter = model.Adapter, GradientLifetime = GradientLifetime.Step };
        var plan = new MemoryPlan(model.Config, shape, dtype, options, training);
        long whole = Peak(Step) - empty; // makes the gradients
        Assert.InRange((double)(plan.TotalBytes - plan.OptimizerBytes) / whole, 0.9, 1.1);
        long persistent = Live() - (length * model.Config.HeadDim * dtype.ElementSize()); // but for the rotary tables, which the plan counts
        Assert.InRange((double)plan.PeakBytes / (Peak(Step) - persistent), 0.9, 1.1);
        Assert.Equal(Parameters(model), plan.WeightBytes);
    }

    [Theory]
    [InlineData("llama", false, ScalarType.Float32, 0)]
    [InlineData("llama", true, ScalarType.BFloat16, 0)]
    [InlineData("llama", false, ScalarType.BFloat16, 16)]
    [InlineData("large vocabulary", true, ScalarType.Float32, 0)]
    [InlineData("q/k norms", false, ScalarType.BFloat16, 0)]
    [InlineData("gemma 2", true, ScalarType.Float32, 0)]
    [InlineData("gemma 2", false, ScalarType.BFloat16, 0)]
    public void ThePlainPlanPredictsThePeakOfThePlainForm(string name, bool recompute, ScalarType dtype, int rank)
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        const int Length = 1024;
        long empty = Live();
        using var model = new CausalLM(s_models[name], dtype);
        if (rank > 0) model.AddAdapter(new LoraConfig { R = rank });
        long measured = Peak(() =>
        {
            using var scope = NewDisposeScope();
            var ids = randint(0, model.Config.VocabSize, [1, Length], ScalarType.Int64);
            PlainDecoder.LossSum(model, ids, ids, recompute).backward();
        }) - empty;
        var plan = new PlainMemoryPlan(model.Config, BatchShape.Document(Length), dtype, recompute, new TrainingMemory { Adapter = model.Adapter });
        Assert.InRange((double)(plan.TotalBytes - plan.OptimizerBytes) / measured, 0.9, 1.1);
    }

    [Theory]
    [InlineData("llama", 0)]
    [InlineData("llama", 4)]
    [InlineData("tied, biases", 0)]
    [InlineData("q/k norms", 4)]
    [InlineData("gemma 2", 0)]
    public void ParametersAreCountedFromTheConfiguration(string name, int rank)
    {
        var adapter = rank == 0 ? null : new LoraConfig { R = rank, TargetModules = ["q_proj", "down_proj", "embed_tokens", "lm_head"] };
        using var model = new CausalLM(s_models[name], ScalarType.BFloat16);
        if (adapter is not null) model.AddAdapter(adapter);
        var counts = new ParameterCounts(model.Config, ScalarType.BFloat16, adapter);
        Assert.Equal(model.parameters().Sum(p => p.numel()), counts.Weights + counts.Adapters);
        Assert.Equal(model.parameters().Where(p => p.requires_grad).Sum(p => p.numel()), Enumerable.Range(0, counts.Head + 1).Sum(counts.Trained));
        Assert.Equal(Parameters(model), new MemoryPlan(model.Config, BatchShape.Document(8), ScalarType.BFloat16, new ComputeOptions(), new TrainingMemory { Adapter = adapter }).WeightBytes);
    }

    [Fact]
    public void TheOptimizersStateIsTwoMomentsAndAMasterCopyOf16BitWeights()
    {
        long Bytes(ScalarType dtype, TrainingMemory training) => new MemoryPlan(s_llama, BatchShape.Document(8), dtype, new ComputeOptions(), training).OptimizerBytes;
        long n = new ParameterCounts(s_llama, ScalarType.Float32, null).Weights;
        Assert.Equal(8 * n, Bytes(ScalarType.Float32, new TrainingMemory()));
        Assert.Equal(16 * n, Bytes(ScalarType.Float64, new TrainingMemory()));
        Assert.Equal(12 * n, Bytes(ScalarType.BFloat16, new TrainingMemory()));
        Assert.Equal(8 * n, Bytes(ScalarType.BFloat16, new TrainingMemory { Moments = ScalarType.BFloat16 }));
        Assert.Equal(4 * n, Bytes(ScalarType.BFloat16, new TrainingMemory { Moments = ScalarType.BFloat16, MasterCopy = false }));
        var adapter = new LoraConfig { R = 4 };
        Assert.Equal(8 * new ParameterCounts(s_llama, ScalarType.BFloat16, adapter).Adapters, Bytes(ScalarType.BFloat16, new TrainingMemory { Adapter = adapter }));
    }

    [Fact]
    public void EachOptionTakesTheMemoryThatItIsMeantToSave()
    {
        long Total(GradientLifetime lifetime, bool offload = false) =>
            new MemoryPlan(s_llama, BatchShape.Document(8192), ScalarType.Float32, new ComputeOptions(256, RecomputePolicy.Full, OffloadFolder: offload ? "a folder" : null), new TrainingMemory { GradientLifetime = lifetime }).TotalBytes;
        Assert.InRange(Total(GradientLifetime.Step), Total(GradientLifetime.Module) + 1, Total(GradientLifetime.Accumulated));
        Assert.Equal(2L * 8192 * 256 * sizeof(float), Total(GradientLifetime.Accumulated) - Total(GradientLifetime.Accumulated, offload: true)); // the inputs of all layers but one
    }

    [Fact]
    public void MoreOfAnythingTakesMoreMemory()
    {
        long Total(DecoderConfig config, int rows, int chunk = 256, RecomputePolicy policy = RecomputePolicy.Full, double labelled = 1) =>
            new MemoryPlan(config, BatchShape.Document(rows, Math.Max(1, (long)(rows * labelled))), ScalarType.BFloat16, new ComputeOptions(chunk, policy)).TotalBytes;
        for (int rows = 1; rows < 5000; rows += 97)
        {
            Assert.InRange(Total(s_llama, rows), 1, Total(s_llama, rows + 97));
            Assert.InRange(Total(s_models["gemma 2"], rows), 1, Total(s_models["gemma 2"], rows + 97));
        }
        Assert.InRange(Total(s_llama, 4096), Total(s_llama with { NumHiddenLayers = 2 }, 4096) + 1, Total(s_llama, 4096, 4096) - 1);
        Assert.InRange(Total(s_llama, 4096, policy: RecomputePolicy.KeepAttention), Total(s_llama, 4096) + 1, Total(s_llama, 4096, policy: RecomputePolicy.None) - 1);
        Assert.InRange(Total(s_llama, 4096, labelled: 0.05, policy: RecomputePolicy.None), 1, Total(s_llama, 4096, policy: RecomputePolicy.None) - 1);
    }

    [Fact]
    public void TheLongestIsTheLastThatFits()
    {
        long Total(int rows) => new MemoryPlan(s_llama, BatchShape.Document(rows), ScalarType.Float32, new ComputeOptions(0, RecomputePolicy.Full)).TotalBytes;
        foreach (long budget in new[] { Total(1), Total(1000), Total(1000) - 1, 1L << 30, 1L << 36 })
        {
            int longest = MemoryPlan.Longest(budget, Total);
            Assert.InRange(Total(longest), 1, budget);
            Assert.True(Total(longest + 1) > budget);
        }
        Assert.Equal(0, MemoryPlan.Longest(Total(1) - 1, Total));
        Assert.Equal(0, MemoryPlan.Longest(0, Total));
        Assert.Equal(int.MaxValue, MemoryPlan.Longest(5, _ => 5));
        Assert.Throws<ArgumentOutOfRangeException>(() => MemoryPlan.Longest(-1, Total));
        Assert.Throws<ArgumentOutOfRangeException>(() => MemoryPlan.Longest((1L << 50) + 1, Total));
    }

    [Fact]
    public void ABatchThatCannotBeIsRefused()
    {
        void Refused(BatchShape batch) => Assert.Throws<ArgumentOutOfRangeException>(() => new MemoryPlan(s_llama, batch, ScalarType.Float32, new ComputeOptions()));
        Refused(BatchShape.Document(0));
        Refused(BatchShape.Document(4, 5));
        Refused(new BatchShape(4, 2, 5, 4));
        Refused(new BatchShape(4, 2, 3, 5));
        Refused(new BatchShape(4, 2, 3, 4, 0));
        foreach (var (name, options) in new (string, ComputeOptions)[]
        {
            ("ChunkSize", new(-1)), ("Recompute", new(Recompute: (RecomputePolicy)9)), ("MemoryBudgetBytes", new(MemoryBudgetBytes: -1)), ("OffloadFolder", new(OffloadFolder: "")),
            ("GradientFilter", new(GradientFilter: 1)), ("GradientFilter", new(GradientFilter: double.NaN)),
        })
            Assert.Equal(name, Assert.Throws<ArgumentOutOfRangeException>(() => new MemoryPlan(s_llama, 4, 4, ScalarType.Float32, options)).ParamName);
        Assert.Throws<ArgumentOutOfRangeException>(() => new PlainMemoryPlan(s_llama, BatchShape.Document(0), ScalarType.Float32, recompute: false));
    }

    [Fact]
    public void ThePlanKeepsWhatTheBudgetAllowsAndNoMore()
    {
        MemoryPlan Plan(long budget) => new(s_llama, 8192, 8191, ScalarType.Float32, new ComputeOptions(MemoryBudgetBytes: budget));
        var least = Plan(0);
        Assert.All(least.Layers, l => Assert.Equal(RecomputePolicy.Full, l));
        Assert.All(Plan(long.MaxValue / 4).Layers, l => Assert.Equal(RecomputePolicy.None, l));
        long room = least.PeakBytes + (64 << 20);
        var some = Plan(room);
        Assert.InRange(some.PeakBytes, least.PeakBytes + 1, room);
        Assert.DoesNotContain(RecomputePolicy.Auto, some.Layers);
    }

    [Fact]
    public void MiniSequencesAreOfASizeThatTheBudgetAllows()
    {
        MemoryPlan Plan(long? budget, RecomputePolicy policy = RecomputePolicy.Full, int chunk = Chunking.Auto) =>
            new(s_models["large vocabulary"], 8192, 8191, ScalarType.Float32, new ComputeOptions(chunk, policy, budget));
        (long, long) Sizes(MemoryPlan plan) => (plan.ChunkRows, plan.LogitRows);
        var (usual, least, most) = (Plan(null), Plan(0), Plan(1L << 40, RecomputePolicy.None));
        Assert.Equal((8192, 1024), Sizes(usual));
        Assert.Equal((256, 256), Sizes(least));
        Assert.Equal(Sizes(usual), Sizes(most));
        Assert.Equal(Sizes(usual), Sizes(Plan(usual.PeakBytes)));
        Assert.Equal((64, 64), Sizes(Plan(0, chunk: 64)));
        Assert.InRange(least.PeakBytes, 1, usual.PeakBytes / 2);
        for (long budget = least.PeakBytes; budget < most.PeakBytes * 11 / 10; budget += most.PeakBytes / 20)
            Assert.InRange(Plan(budget, RecomputePolicy.Auto).PeakBytes, least.PeakBytes, budget);
    }

    private static (BatchShape Shape, Func<TokenBatch> Make) Batch(int length, double labelled, int documents)
    {
        int targets = Math.Min(length - 1, (int)(length * labelled));
        long[] ids = [.. Enumerable.Range(0, length).Select(i => (long)(i * 7 % 4096))];
        long[] labels = [.. ids.Select((id, i) => i < length - targets ? LinearCrossEntropy.IgnoreIndex : id)];
        var one = BatchShape.Document(length, targets);
        var shape = new BatchShape(documents * one.Rows, documents * one.Targets, documents * one.WantedRows, length, documents);
        return (shape, () => new TokenBatch([.. Enumerable.Repeat(new TokenSequence(ids, labels), documents)]));
    }

    private static long Parameters(CausalLM model) => model.parameters().Sum(p => p.numel() * p.element_size());

    // What other tests left to the garbage collector must not be freed in the middle of a measurement.
    private static long Live()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return TensorMemory.LiveBytes;
    }

    private static long Peak(Action step)
    {
        Live();
        TensorMemory.ResetPeak();
        step();
        return TensorMemory.PeakBytes;
    }
}
