using Microsoft.ML;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.MLNet.Tests;

/// <summary>Checkpoints and adapters: loaded without training, trained with LoRA, saved, and found again.</summary>
public sealed class PretrainedTests
{
    private static readonly string[] s_documents = ["document 1 says b", "something else", ""];

    /// <summary>A checkpoint of the tiny model after some training.</summary>
    private static string Checkpoint(TemporaryFolder folder, MLContext ml, Precision precision = Precision.Float32)
    {
        var options = Tiny.Options();
        options.Precision = precision;
        using var model = ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml));
        model.SavePretrained(folder["base"]);
        return folder["base"];
    }

    private static FineTuneOptions Adapting(string model, LoraConfig? lora = null) => new()
    {
        Model = model,
        Lora = lora ?? new LoraConfig { R = 4, LoraDropout = 0.1 },
        MaxLength = 64,
        Training = new TrainingOptions { MaxSteps = 6, LearningRate = 0.05 },
        Generation = new GenerationOptions { MaxNewTokens = 6 },
        Seed = 3,
    };

    private static PretrainedOptions AsTrained(string model, string? adapter = null) => new()
    {
        Model = model,
        Adapter = adapter,
        LabelColumnName = "Summary",
        PromptTemplate = Tiny.Options().PromptTemplate,
        MaxLength = 64,
        Generation = new GenerationOptions { MaxNewTokens = 6 },
    };

    [Fact]
    public void ACheckpointWritesAsTheModelThatWasSaved()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        using var trained = ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml));
        trained.SavePretrained(folder["base"]);
        using var loaded = ml.MiniSeq().LoadPretrained(AsTrained(folder["base"]));
        Assert.Equal(s_documents.Select(d => trained.Generate(d)), s_documents.Select(d => loaded.Generate(d)));
        Assert.Equal(ml.MiniSeq().Evaluate(Tiny.Rows(ml), trained).Loss, ml.MiniSeq().Evaluate(Tiny.Rows(ml), loaded).Loss, 1e-6);
        using var plain = ml.MiniSeq().LoadPretrained(folder["base"], maxLength: 200);
        Assert.Equal(4, Tiny.Texts(ml, plain.Transform(Tiny.Rows(ml, 4))).Count);
        Assert.Throws<InvalidOperationException>(() => plain.SaveAdapter(folder["none"]));
        Assert.Throws<FileNotFoundException>(() => ml.MiniSeq().LoadPretrained(folder["nowhere"]));
        Assert.Throws<ArgumentException>(() => ml.MiniSeq().LoadPretrained(folder["base"], promptTemplate: "no place"));
        Assert.Contains("128 tokens after the prompt", Assert.ThrowsAny<ArgumentException>(() => ml.MiniSeq().LoadPretrained(folder["base"], maxLength: 64)).Message);
    }

    [Fact]
    public void LoraTrainsAnAdapterAndLeavesTheCheckpointAlone()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        string checkpoint = Checkpoint(folder, ml);
        var rows = Tiny.Rows(ml);
        using var before = ml.MiniSeq().LoadPretrained(AsTrained(checkpoint));
        using var adapted = ml.MiniSeq().FineTune(Adapting(checkpoint)).Fit(rows);
        Assert.True(ml.MiniSeq().Evaluate(rows, adapted).Loss < ml.MiniSeq().Evaluate(rows, before).Loss);
        foreach (var (name, p) in before.Model.named_parameters())
            Assert.Equal(p.data<float>().ToArray(), adapted.Model.named_parameters().First(a => a.name == name).parameter.data<float>().ToArray());

        adapted.SaveAdapter(folder["adapter"]);
        Assert.Equal(checkpoint, LoraConfig.FromPretrained(folder["adapter"]).BaseModelNameOrPath);
        using var together = ml.MiniSeq().LoadPretrained(AsTrained(checkpoint, folder["adapter"]));
        Assert.Equal(s_documents.Select(d => adapted.Generate(d)), s_documents.Select(d => together.Generate(d)));

        adapted.SavePretrained(folder["merged"]);
        Assert.NotNull(adapted.Model.Adapter); // the model itself is not merged
        using var merged = ml.MiniSeq().LoadPretrained(AsTrained(folder["merged"]));
        Assert.Equal(ml.MiniSeq().Evaluate(rows, adapted).Loss, ml.MiniSeq().Evaluate(rows, merged).Loss, 1e-5);
    }

    [Fact]
    public void ASavedAdapterFindsItsCheckpointAndOnlyThat()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        string checkpoint = Checkpoint(folder, ml);
        var rows = Tiny.Rows(ml);
        using var adapted = ml.MiniSeq().FineTune(Adapting(checkpoint)).Fit(rows);
        ml.MiniSeq().Save(adapted, rows.Schema, folder["model.zip"]);
        string adapter = Assert.Single(Directory.GetDirectories(folder.Path, "miniseq-model-*"));
        Assert.True(File.Exists(Path.Combine(adapter, "adapter_model.safetensors")));
        Assert.False(File.Exists(Path.Combine(adapter, "model.safetensors")));
        Assert.Equal(s_documents.Select(d => adapted.Generate(d)), SavingTests.Fresh(folder["model.zip"]));

        string Said() => Assert.ThrowsAny<Exception>(() => ml.MiniSeq().FromModel(ml.MiniSeq().Load(folder["model.zip"], out _))).Message;
        Directory.Move(checkpoint, folder["moved"]);
        Assert.Contains("The checkpoint below the adapter of this MiniSeq model is a folder 'base'", Said());
        MiniSeqCatalog.ModelSearchPaths = [folder["moved"]];
        try
        {
            using (var found = ml.MiniSeq().FromModel(ml.MiniSeq().Load(folder["model.zip"], out _)))
                Assert.Equal(adapted.Generate("x"), found.Generate("x"));
            File.AppendAllText(Path.Combine(folder["moved"], "config.json"), " ");
            Assert.Contains("config.json' is damaged or not the file", Said());
        }
        finally
        {
            MiniSeqCatalog.ModelSearchPaths = [];
        }
    }

    [Fact]
    public void ACheckpointIsNotOverwrittenByAnAdapterNorTheOtherWayRound()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        string checkpoint = Checkpoint(folder, ml);
        var options = Adapting(checkpoint);
        options.WeightsFolder = checkpoint;
        using var adapted = ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml));
        Assert.Contains("holds a checkpoint", Assert.Throws<InvalidOperationException>(() => ml.MiniSeq().Save(adapted, null, folder["model.zip"])).Message);
        Assert.Contains("holds a checkpoint", Assert.Throws<InvalidOperationException>(() => adapted.SaveAdapter(checkpoint)).Message);
        Assert.True(File.Exists(Path.Combine(checkpoint, "model.safetensors")));
        adapted.SaveAdapter(folder["adapter"]);
        Assert.Contains("holds a LoRA adapter", Assert.Throws<InvalidOperationException>(() => adapted.SavePretrained(folder["adapter"])).Message);
        using var full = ml.MiniSeq().FineTune(Tiny.Options(folder["adapter"])).Fit(Tiny.Rows(ml));
        Assert.Contains("holds an adapter", Assert.Throws<InvalidOperationException>(() => ml.MiniSeq().Save(full, null, folder["full.zip"])).Message);
        Assert.Empty(Directory.GetFileSystemEntries(folder.Path, "*.tmp"));
    }

    // As Hugging Face's cache keeps them.
    [Fact]
    public void ACheckpointOfLinksIsFoundAgainAndOneThatChangedMeanwhileIsNotSealed()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        string real = Checkpoint(folder, ml);
        Directory.CreateDirectory(folder["links"]);
        foreach (string file in Directory.GetFiles(real)) File.CreateSymbolicLink(Path.Combine(folder["links"], Path.GetFileName(file)), file);
        using var adapted = ml.MiniSeq().FineTune(Adapting(folder["links"])).Fit(Tiny.Rows(ml));
        ml.MiniSeq().Save(adapted, null, folder["model.zip"]);
        using (var again = ml.MiniSeq().FromModel(ml.MiniSeq().Load(folder["model.zip"], out _)))
            Assert.Equal(adapted.Generate("x"), again.Generate("x"));
        File.AppendAllText(Path.Combine(real, "config.json"), " ");
        Assert.Contains("has changed since", Assert.Throws<InvalidOperationException>(() => ml.MiniSeq().Save(adapted, null, folder["late.zip"])).Message);
    }

    [Fact]
    public void PrecisionIsKeptBySavingAndFollowsTheCheckpoint()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        string narrow = Checkpoint(folder, ml, Precision.BFloat16);
        Assert.Equal(ScalarType.BFloat16, Models.Checkpoint.StoredType(narrow));
        using var wide = ml.MiniSeq().LoadPretrained(new PretrainedOptions { Model = narrow, Precision = Precision.Float32, MaxLength = 200 });
        Assert.Equal(ScalarType.Float32, wide.Model.DType);
        using var automatic = ml.MiniSeq().LoadPretrained(narrow, maxLength: 200);
        Assert.Equal(Precision.Auto.Resolve(ScalarType.BFloat16, CPU), automatic.Model.DType);
        Assert.Equal(ScalarType.Float32, Precision.Auto.Resolve(ScalarType.Float32, CPU));

        var options = Adapting(narrow);
        options.Precision = Precision.Float32;
        using var adapted = ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml));
        ml.MiniSeq().Save(adapted, null, folder["model.zip"]);
        using var again = ml.MiniSeq().FromModel(ml.MiniSeq().Load(folder["model.zip"], out _));
        Assert.Equal(ScalarType.Float32, again.Model.DType);
    }

    [Fact]
    public void AnAdapterNeedsACheckpointThatItFits()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var options = Tiny.Options();
        options.Lora = new LoraConfig();
        Assert.Contains("Lora goes with Model", Assert.Throws<ArgumentException>(() => ml.MiniSeq().FineTune(options)).Message);
        string checkpoint = Checkpoint(folder, ml);
        Assert.Contains("w_proj", Assert.Throws<ArgumentException>(() => ml.MiniSeq().FineTune(Adapting(checkpoint, new LoraConfig { TargetModules = ["w_proj"] })).Fit(Tiny.Rows(ml))).Message);
        Assert.Contains("r is 0", Assert.Throws<ArgumentException>(() => ml.MiniSeq().FineTune(Adapting(checkpoint, new LoraConfig { R = 0 }))).Message);
        Assert.Throws<FileNotFoundException>(() => ml.MiniSeq().LoadPretrained(checkpoint, adapter: checkpoint));
    }

    [Fact]
    public void AManifestOfTheFirstVersionIsStillRead()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml));
        var now = Manifest.Write(model.Session, folder["weights"]);
        Assert.Equal(1, now.Version);
        var json = System.Text.Json.Nodes.JsonNode.Parse(now.ToJson())!;
        json["Settings"]!.AsObject().Remove("DType");
        json["Settings"]!.AsObject().Remove("ChatTemplate");
        json.AsObject().Remove("Adapted");
        var old = Manifest.Parse(json.ToJsonString().AsMemory());
        Assert.Null(old.Settings.DType);
        json["Version"] = 3;
        Assert.Contains("version 3", Assert.Throws<InvalidDataException>(() => Manifest.Parse(json.ToJsonString().AsMemory())).Message);
        json["Version"] = 2;
        json["Adapted"] = System.Text.Json.Nodes.JsonNode.Parse("""{"Folder":"/x","Files":{"../y":{"Bytes":1,"Sha256":""}}}""");
        Assert.Throws<InvalidDataException>(() => Manifest.Parse(json.ToJsonString().AsMemory()));
    }
}
