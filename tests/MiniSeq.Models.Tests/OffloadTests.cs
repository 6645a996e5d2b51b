using MiniSeq.Layers;
using MiniSeq.Models;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class OffloadTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("miniseq-offload-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    private static TokenSequence Document(int length, int firstLabel, int seed)
    {
        var random = new Random(seed);
        long[] ids = [.. Enumerable.Range(0, length).Select(_ => random.NextInt64(31))];
        return new TokenSequence(ids, [.. ids.Select((id, i) => i < firstLabel ? -100 : id)]);
    }

    // Files that this process has open in the folder, with a name or without.
    private int OpenFiles() => !OperatingSystem.IsLinux() ? 0 : Directory.GetFiles("/proc/self/fd").Count(f => new FileInfo(f).LinkTarget?.StartsWith(_folder, StringComparison.Ordinal) == true);

    [Theory]
    [InlineData(ScalarType.Float32, RecomputePolicy.Auto, 0)]
    [InlineData(ScalarType.Float32, RecomputePolicy.None, 0)]
    [InlineData(ScalarType.Float32, RecomputePolicy.KeepAttention, 7)] // the last layer's rows alone are wanted
    [InlineData(ScalarType.BFloat16, RecomputePolicy.Full, 0)]
    [InlineData(ScalarType.BFloat16, RecomputePolicy.Auto, 7)]
    [InlineData(ScalarType.Float64, RecomputePolicy.Full, 7)]
    public void LossAndGradientsAreTheSameToTheBit(ScalarType dtype, RecomputePolicy policy, int firstLabel)
    {
        using var scope = NewDisposeScope();
        random.manual_seed(1);
        using var model = new CausalLM(DecoderTests.Tiny(), dtype);
        using var batch = new TokenBatch([Document(11, firstLabel, 1), Document(1, 1, 2), Document(9, firstLabel, 3)]);
        var options = new ComputeOptions(4, policy, policy == RecomputePolicy.Auto ? 0 : null);
        using var kept = model.ForwardBackward(batch, 0.25, options);
        var want = GradientsOf(model);
        ClearGradients(model);
        using var loss = model.ForwardBackward(batch, 0.25, options with { OffloadFolder = _folder });
        Assert.Equal(kept.LossSum.item<double>(), loss.LossSum.item<double>());
        foreach (var (name, gradient) in GradientsOf(model)) Assert.True(gradient!.eq(want[name]!).all().item<bool>(), name);
        Assert.Equal(0, OpenFiles());
        Assert.Empty(Directory.GetFiles(_folder));
    }

    [Fact]
    public void NothingIsLeftAfterAnExceptionInTheMiddle()
    {
        using var model = new CausalLM(DecoderTests.Tiny());
        using var batch = new TokenBatch([Document(9, 0, 1)]);
        int seen = 0;
        model.Evaluate(batch); // makes the tables of the rotary embedding
        var (_, before) = AliveAfterCollection();
        var error = Assert.Throws<InvalidOperationException>(() => model.ForwardBackward(batch, 1, new ComputeOptions(OffloadFolder: _folder), default, (_, parameters) =>
        {
            foreach (var p in parameters) p.grad = null;
            if (OperatingSystem.IsLinux()) Assert.Equal(1, OpenFiles());
            if (!OperatingSystem.IsWindows()) Assert.Empty(Directory.GetFiles(_folder)); // a crash here would leave nothing
            if (++seen == 2) throw new InvalidOperationException("in the middle");
        }));
        Assert.Equal("in the middle", error.Message);
        Assert.Equal(0, OpenFiles());
        Assert.Empty(Directory.GetFiles(_folder));
        Assert.Equal(before, AliveAfterCollection().Tensors);
    }

    [Fact]
    public void AFolderThatCannotBeWrittenToIsNamed()
    {
        using var model = new CausalLM(DecoderTests.Tiny());
        using var batch = new TokenBatch([Document(9, 0, 1)]);
        string file = Path.Combine(_folder, "file");
        File.WriteAllText(file, "");
        List<string> folders = [Path.Combine(_folder, "missing"), file];
        if (OperatingSystem.IsLinux()) folders.Add("/proc"); // not even for root
        foreach (string folder in folders)
        {
            var error = Assert.Throws<IOException>(() => model.ForwardBackward(batch, 1, new ComputeOptions(OffloadFolder: folder)));
            Assert.Contains($"of {3 * 9 * 12 * 4:N0} bytes", error.Message);
            Assert.Contains($"'{folder}' (ComputeOptions.OffloadFolder)", error.Message);
            Assert.Contains("Name a folder that exists", error.Message);
            Assert.All(model.parameters(), p => Assert.Null(p.grad));
            Assert.Throws<IOException>(() => OffloadFile.CheckFolder(folder));
        }
        OffloadFile.CheckFolder(_folder);
    }

    [Fact]
    public void AFullDiskIsAnOrdinaryException()
    {
        Assert.SkipUnless(File.Exists("/dev/full"), "no device that is always full");
        using var scope = NewDisposeScope();
        using var store = new OffloadFile(_folder, 1 << 20, File.OpenHandle("/dev/full", access: FileAccess.ReadWrite));
        var error = Assert.Throws<IOException>(() => store.Push(zeros(1 << 18)));
        Assert.Contains("1,048,576 bytes", error.Message);
        Assert.Contains("bytes are free there", error.Message);
    }

    [Fact]
    public void TensorsOfSeveralPiecesComeBackInReverseOrder()
    {
        using var scope = NewDisposeScope();
        random.manual_seed(2);
        Tensor[] tensors = [randn(1500, 2000), randn(3, 5).t(), randn(0, 4), randn(1100, 4000).to(ScalarType.BFloat16)];
        using var store = new OffloadFile(_folder, 0);
        for (int turn = 0; turn < 2; turn++)
        {
            foreach (var t in tensors) store.Push(t);
            foreach (var t in tensors.Reverse())
            {
                var back = store.Pop();
                Assert.Equal((t.dtype, true), (back.dtype, back.shape.AsSpan().SequenceEqual(t.shape)));
                Assert.True(back.eq(t).all().item<bool>());
            }
        }
    }

    [Fact]
    public void OneLayersInputIsInMemoryAtATime()
    {
        Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here");
        const int Layers = 10, Hidden = 64;
        var config = DecoderConfig.Llama(64, Hidden, 128, Layers, 2, 1);
        using var model = new CausalLM(config);
        long Peak(int length, string? folder)
        {
            using var batch = new TokenBatch([Document(length, 0, 1)]);
            long before = TensorMemory.LiveBytes;
            TensorMemory.ResetPeak();
            model.ForwardBackward(batch, 1, new ComputeOptions(256, RecomputePolicy.Full, OffloadFolder: folder)).Dispose();
            return TensorMemory.PeakBytes - before;
        }
        double Growth(string? folder) => (Peak(4096, folder) - Peak(2048, folder)) / 2048.0;
        double Planned(string? folder) => new MemoryPlan(config, 4096, 4095, ScalarType.Float32, new ComputeOptions(256, RecomputePolicy.Full, OffloadFolder: folder)).PeakBytes;
        Peak(4096, null); // makes gradients, and the tables of the rotary embedding
        double kept = Growth(null), offloaded = Growth(_folder);
        const int Input = 4 * Hidden; // bytes of a row
        Assert.InRange(kept - offloaded, (Layers - 1.1) * Input, (Layers - 0.9) * Input);
        Assert.InRange(offloaded, 0, 9 * Input); // input and gradient, and one layer's q, k, v and attention with their gradients
        Assert.InRange(Planned(_folder) / Peak(4096, _folder), 0.85, 1.15);
        Assert.Equal((Layers - 1) * Input * 4096, Planned(null) - Planned(_folder));
    }

    [Fact]
    public void AutoKeepsNothingUnlessABudgetIsGiven()
    {
        MemoryPlan Plan(long? budget, RecomputePolicy policy = RecomputePolicy.Auto) => new(DecoderTests.Tiny(), 100, 99, ScalarType.Float32, new ComputeOptions(8, policy, budget, _folder));
        Assert.All(Plan(null).Layers, l => Assert.Equal(RecomputePolicy.Full, l));
        Assert.All(Plan(1L << 40).Layers, l => Assert.Equal(RecomputePolicy.None, l));
        Assert.All(Plan(null, RecomputePolicy.KeepAttention).Layers, l => Assert.Equal(RecomputePolicy.KeepAttention, l));
    }
}
