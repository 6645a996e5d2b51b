using MiniSeq.Models;
using MiniSeq.Models.Tests;
using static MiniSeq.Tests.Reference;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class CheckpointTests
{
    [Fact]
    public void SaveAndLoadGiveTheSameModel()
    {
        using var folder = new TemporaryFolder();
        foreach (bool tied in new[] { true, false })
        {
            using var model = new CausalLM(DecoderTests.Tiny(tied) with { EosTokenIds = [2, 3], BosTokenId = 1 });
            model.SavePretrained(folder.Path, maxShardBytes: 2000);
            using var loaded = Checkpoint.LoadPretrained(folder.Path);
            Assert.Equal(model.Config.ToJson(model.DType), loaded.Config.ToJson(loaded.DType));
            using var ids = tensor(new long[,] { { 1, 2, 3, 4 } });
            using var a = model.call(ids);
            using var b = loaded.call(ids);
            Close(b, a, 0);
            Directory.Delete(folder.Path, true);
        }
        Directory.CreateDirectory(folder.Path);
    }

    [Fact]
    public void AModelConvertedInMemoryIsSavedAsItIsNow()
    {
        using var scope = NewDisposeScope();
        using var folder = new TemporaryFolder();
        using var model = new CausalLM(DecoderTests.Tiny());
        TorchSharp.ModuleExtensionMethods.to(model, ScalarType.BFloat16);
        model.SavePretrained(folder.Path);
        Assert.Equal(ScalarType.BFloat16, Checkpoint.StoredType(folder.Path));
        using var loaded = Checkpoint.LoadPretrained(folder.Path);
        foreach (var ((_, a), (_, b)) in loaded.named_parameters().Zip(model.named_parameters())) Close(a, b, 0);
    }

    [Theory]
    [InlineData("\"model_type\": \"falcon_mamba\"", "falcon_mamba")]
    [InlineData("\"rope_scaling\": {\"rope_type\": \"longrope\"}", "longrope")]
    [InlineData("\"rope_scaling\": {\"rope_type\": \"yarn\"}", "factor")]
    [InlineData("\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}", "low_freq_factor")]
    [InlineData("\"quantization_config\": {}", "quantization_config")]
    [InlineData("\"attention_dropout\": 0.1", "attention_dropout 0.1")]
    [InlineData("\"partial_rotary_factor\": 0.5", "partial_rotary_factor 0.5")]
    [InlineData("\"num_hidden_layers\": 2000000000", "num_hidden_layers is 2000000000")]
    [InlineData("\"num_hidden_layers\": 2.5", "2.5, which is not a whole number")]
    [InlineData("\"hidden_act\": \"relu\"", "relu")]
    [InlineData("\"num_key_value_heads\": 2", "do not divide")]
    [InlineData("\"hidden_size\": -4", "hidden_size is -4")]
    [InlineData("\"vocab_size\": null", "lacks vocab_size")]
    [InlineData("\"head_dim\": 3", "head_dim is 3")]
    [InlineData("\"vocab_size\": \"many\"", "not a valid config.json")]
    public void AConfigurationThatDoesNotFitIsRefusedByName(string change, string said)
    {
        using var folder = new TemporaryFolder();
        string key = change[..change.IndexOf(':')];
        var lines = DecoderTests.Tiny().ToJson(ScalarType.Float32).Split('\n').Where(l => !l.Contains(key)).ToList();
        lines.Insert(1, $"  {change},");
        File.WriteAllText(folder["config.json"], string.Join('\n', lines));
        Assert.Contains(said, Assert.ThrowsAny<Exception>(() => DecoderConfig.FromPretrained(folder.Path)).Message);
    }

    [Fact]
    public void WeightsThatDoNotFitTheConfigurationAreNamed()
    {
        using var folder = new TemporaryFolder();
        Assert.Contains("config.json", Assert.Throws<FileNotFoundException>(() => Checkpoint.LoadPretrained(folder.Path)).Message);
        using var model = new CausalLM(DecoderTests.Tiny());
        model.SavePretrained(folder.Path);
        File.WriteAllText(folder["config.json"], (model.Config with { IntermediateSize = 24 }).ToJson(model.DType));
        Assert.Contains("mlp", Assert.Throws<InvalidDataException>(() => Checkpoint.LoadPretrained(folder.Path)).Message);
        File.WriteAllText(folder["config.json"], (model.Config with { NumHiddenLayers = 2 }).ToJson(model.DType));
        Assert.Contains("no place for", Assert.Throws<InvalidDataException>(() => Checkpoint.LoadPretrained(folder.Path)).Message);
        File.WriteAllText(folder["config.json"], (model.Config with { NumHiddenLayers = 4 }).ToJson(model.DType));
        Assert.Contains("lack the tensor", Assert.Throws<InvalidDataException>(() => Checkpoint.LoadPretrained(folder.Path)).Message);
    }
}
