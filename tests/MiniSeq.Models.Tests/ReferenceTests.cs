using System.Text.Json;
using MiniSeq.Bench;
using MiniSeq.Models;
using MiniSeq.Models.Tests;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

/// <summary>Every folder of <c>../shared/reference</c>: logits, loss, gradients and greedy text are Hugging Face's, with an adapter PEFT's, however
/// the step is computed.</summary>
public sealed class ReferenceTests
{
    private const string Root = "reference", Adapted = "llama3/adapter";

    // What this version does not compute. Every other folder has to load.
    private static readonly string[] s_refused = ["falcon_mamba"];

    private static readonly ComputeOptions[] s_everyWay =
        [.. from chunk in new[] { 1, 7, 64, 0 } from policy in new[] { RecomputePolicy.Full, RecomputePolicy.KeepAttention, RecomputePolicy.None } select new ComputeOptions(chunk, policy)];

    /// <summary>The folders that have to load, or one name that skips the test where there are none.</summary>
    public static TheoryData<string> Folders => Shared.Folders(Root) is { Length: > 0 } found ? [.. found.Except(s_refused)] : ["(none)"];

    [Theory]
    [MemberData(nameof(Folders))]
    public void LogitsLossGradientsAndGreedyTextAreHuggingFaces(string name)
    {
        using var folder = Open(name);
        Assert.Empty(ReferenceBounds.Of(ScalarType.Float32).Faults(folder.Check(s_everyWay)));
    }

    [Fact]
    public void WithAnAdapterEverythingIsPeftsAlsoAfterTheMerge()
    {
        using var folder = Open(Adapted);
        var result = folder.Check(s_everyWay);
        Assert.Empty(ReferenceBounds.Of(ScalarType.Float32).Faults(result));
        Assert.Equal(folder.Model.named_parameters().Count(p => p.name.Contains("lora_")), result.Gradients.Count);
        Assert.NotNull(result.Merged);
        using var narrow = Open(Adapted, ScalarType.BFloat16);
        Assert.Empty(ReferenceBounds.Of(ScalarType.BFloat16).Faults(narrow.Check([new ComputeOptions(7)])));
    }

    [Fact]
    public void AnotherScaleOfTheAdapterShowsEverywhere()
    {
        using var copy = new TemporaryFolder();
        CopyAll(Shared.Path($"{Root}/{Adapted}/.."), copy.Path);
        CopyAll(Shared.Path($"{Root}/{Adapted}"), Directory.CreateDirectory(copy["adapter"]).FullName);
        var config = LoraConfig.FromPretrained(copy["adapter"]);
        File.WriteAllText(copy["adapter/adapter_config.json"], (config with { LoraAlpha = 1.1 * config.LoraAlpha }).ToJson());
        using var folder = ReferenceFolder.Open(copy["adapter"]);
        var result = folder.Check([new ComputeOptions(7)]);
        var faults = ReferenceBounds.Of(ScalarType.Float32).Faults(result);
        Assert.Superset(new HashSet<string> { "logits", "loss", "logits of the merged model" }, faults.ToHashSet());
        Assert.All(result.Gradients, g => Assert.Contains($"gradient of {g.Key}", faults));
    }

    /// <summary>A driven step in float64 is as far from Hugging Face's float32 numbers as these are from Hugging Face's float64 (which takes the
    /// angles of the rotary embedding in float32 all the same, hence the half more).</summary>
    [Theory]
    [MemberData(nameof(Folders))]
    public void InFloat64OnlyTheFilesOwnRoundingIsLeft(string name)
    {
        using var folder = Open(name, ScalarType.Float64);
        var result = folder.Check([new ComputeOptions(7)]);
        var noise = Assert.IsType<ReferenceNoise>(result.Noise);
        Assert.InRange(result.Inference.LogitsAbsolute, 0, 1.5 * noise.LogitsAbsolute);
        Assert.InRange(result.WorstGradient(d => d.L2)!.Off, 0, 1.5 * noise.GradientL2);
    }

    [Theory]
    [MemberData(nameof(Folders))]
    public void InBFloat16ItStaysWithinItsBounds(string name)
    {
        using var folder = Open(name, ScalarType.BFloat16);
        var result = folder.Check([new ComputeOptions(7)]);
        Assert.Empty(ReferenceBounds.Of(ScalarType.BFloat16).Faults(result));
        Assert.NotEmpty(ReferenceBounds.Of(ScalarType.Float32).Faults(result));
    }

    [Theory]
    [MemberData(nameof(Folders))]
    public void AShardedCopyGivesTheSameNumbers(string name)
    {
        using var original = Open(name);
        using var copy = new TemporaryFolder();
        CopyNumbers(name, copy.Path);
        original.Model.SavePretrained(copy.Path, maxShardBytes: 50_000);
        Assert.True(Directory.GetFiles(copy.Path, "model-*.safetensors").Length > 3);
        using var sharded = ReferenceFolder.Open(copy.Path);
        Assert.Equal(original.Check([new ComputeOptions(7)]).Gradients, sharded.Check([new ComputeOptions(7)]).Gradients);
        Assert.Empty(ReferenceBounds.Of(ScalarType.Float32).Faults(sharded.Check([new ComputeOptions(7)])));
    }

    /// <summary>A file in bfloat16 is read without further rounding and computed in float32: it gives exactly the numbers of weights that were
    /// rounded in memory, and not those from before the rounding.</summary>
    [Theory]
    [MemberData(nameof(Folders))]
    public void ABFloat16CopyIsComputedInFloat32(string name)
    {
        using var original = Open(name);
        using var copy = new TemporaryFolder();
        CopyNumbers(name, copy.Path);
        using (var rounded = Checkpoint.LoadPretrained(Shared.Path($"{Root}/{name}"), ScalarType.BFloat16)) rounded.SavePretrained(copy.Path);
        using (var before = ReferenceFolder.Open(copy.Path))
            Assert.Contains("logits", ReferenceBounds.Of(ScalarType.Float32).Faults(before.Check([new ComputeOptions(7)])));

        Round(original.Model);
        WriteNumbers(original.Model, copy.Path);
        using var after = ReferenceFolder.Open(copy.Path);
        Assert.Equal(ScalarType.Float32, after.Model.DType);
        var result = after.Check([new ComputeOptions(7)]);
        Assert.Equal(new Difference(0, 0), result.Logits);
        Assert.All(result.Gradients, g => Assert.Equal(new Difference(0, 0), g.Value));
        Assert.InRange(result.Loss, 0, 1e-9); // the mean is kept in float64, the file's loss too
    }

    [Theory]
    [InlineData("bfloat16, attn_implementation=eager", ScalarType.BFloat16)]
    [InlineData("float32, weights from bfloat16", ScalarType.Float32)]
    [InlineData(null, ScalarType.Float32)]
    public void TheNumbersSayInWhichTypeTheyAreComputed(string? said, ScalarType dtype)
    {
        using var folder = new TemporaryFolder();
        using var model = new CausalLM(DecoderTests.Tiny());
        using var ids = ones(1, 4, dtype: ScalarType.Int64);
        model.SavePretrained(folder.Path);
        SafetensorsWriter.Save(folder["expected.safetensors"], [("input_ids", ids), ("labels", ids), ("logits", ids), ("loss", ids[0, ..1]), .. model.CheckpointTensors().Select(t => ($"grad.{t.Name}", (Tensor)t.Parts[0]))]);
        File.WriteAllText(folder["expected.json"], $$$"""{"computed_in":{{{JsonSerializer.Serialize(said)}}},"greedy":{"prompt":[1],"new_tokens":[2]}}""");
        using var byItself = ReferenceFolder.Open(folder.Path);
        using var asTold = ReferenceFolder.Open(folder.Path, ScalarType.Float64);
        Assert.Equal((dtype, ScalarType.Float64), (byItself.Model.DType, asTold.Model.DType));
    }

    [Fact]
    public void OtherArchitecturesAreRefused() =>
        Assert.All(s_refused, name => Assert.Throws<NotSupportedException>(() => ReferenceFolder.Open(Shared.Path($"{Root}/{name}"))));

    [Fact]
    public void ARealPretrainedModelWritesItsReferenceText()
    {
        using var folder = ReferenceFolder.Open(Shared.Path("models/stories260K"));
        var result = folder.Check([new ComputeOptions(7)]);
        Assert.Empty(new ReferenceBounds(1e-5, Entrywise: true, NearTies: false).Faults(result));
        Assert.Equal(200, result.Inference.Greedy.Equal);
    }

    [Fact]
    public void AFolderWithoutUsableNumbersIsNamed()
    {
        using var folder = new TemporaryFolder();
        using var model = new CausalLM(DecoderTests.Tiny());
        model.SavePretrained(folder.Path);
        Assert.Contains("no expected.safetensors", Assert.Throws<FileNotFoundException>(() => ReferenceFolder.Open(folder.Path)).Message);
        File.WriteAllText(folder["reference.json"], "{}");
        Assert.Contains("it lacks 'ids'", Assert.Throws<InvalidDataException>(() => ReferenceFolder.Open(folder.Path)).Message);
        using var some = ones(1, 4, dtype: ScalarType.Int64);
        using var one = ones(1);
        SafetensorsWriter.Save(folder["expected.safetensors"], [("input_ids", some), ("labels", some), ("logits", one), ("loss", one)]);
        Assert.Throws<FileNotFoundException>(() => ReferenceFolder.Open(folder.Path));
        File.WriteAllText(folder["expected.json"], """{"greedy":{"prompt":[1],"new_tokens":[2]}}""");
        Assert.Contains("no gradient of 'model.embed_tokens.weight'", Assert.Throws<InvalidDataException>(() => ReferenceFolder.Open(folder.Path)).Message);
    }

    [Fact]
    public void OneWrongEntryShows()
    {
        using var scope = NewDisposeScope();
        var want = ones(100, 100);
        var got = want.clone();
        got[3, 4] = 1.5;
        Assert.Equal(new Difference(0.5, 0.005), Difference.Of(got, want));
        Assert.Equal(new Difference(0, 0), Difference.Of(zeros(2), zeros(2)));
        foreach (var (bad, good) in new[] { (ones(2), zeros(2)), (full(2, double.NaN), ones(2)), (ones(2), ones(3)), (ones(2), full(2, double.PositiveInfinity)) })
            Assert.Equal(new Difference(double.PositiveInfinity, double.PositiveInfinity), Difference.Of(bad, good));
    }

    private static ReferenceFolder Open(string name, ScalarType dtype = ScalarType.Float32) => ReferenceFolder.Open(Shared.Path($"{Root}/{name}"), dtype);

    private static void CopyAll(string from, string to)
    {
        foreach (string file in Directory.GetFiles(from)) File.Copy(file, Path.Combine(to, Path.GetFileName(file)));
    }

    private static void CopyNumbers(string name, string folder)
    {
        foreach (var file in new[] { "expected.safetensors", "expected.json" }) File.Copy(Path.Combine(Shared.Path($"{Root}/{name}"), file), Path.Combine(folder, file));
    }

    private static void Round(CausalLM model)
    {
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        foreach (var p in model.parameters()) p.copy_(p.to(ScalarType.BFloat16));
    }

    // This library's own numbers, for the ids and labels that are there.
    private static void WriteNumbers(CausalLM model, string folder)
    {
        using var scope = NewDisposeScope();
        using var old = ReferenceNumbers.Read(folder);
        using var batch = old.Batch();
        using var loss = model.ForwardBackward(batch, 1.0 / batch.TargetCount, new ComputeOptions(7));
        SafetensorsWriter.Save(Path.Combine(folder, "expected.safetensors"), [("input_ids", old.InputIds), ("labels", old.Labels), ("logits", model.call(old.InputIds)),
            ("loss", tensor(new[] { loss.Mean })), .. ReferenceFolder.Gradients(model).Select(g => ($"grad.{g.Key}", g.Value))]);
    }
}
