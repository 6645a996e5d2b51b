using System.Diagnostics;
using System.Text.Json;
using Microsoft.ML;
using static TorchSharp.torch;

namespace MiniSeq.MLNet.Tests;

public sealed class SavingTests
{
    private static readonly string[] s_documents = ["document 1 says b", "something else", ""];

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void AFreshProcessWritesTheSameTextAlsoWhenBothWereMoved(bool moved)
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml);
        var chain = ml.Transforms.CopyColumns("Copy", "Document").Append(ml.MiniSeq().FineTune(Tiny.Options())).Fit(rows);
        using var typed = ml.MiniSeq().FromModel(chain);
        Directory.CreateDirectory(folder["a"]);
        ml.MiniSeq().Save(chain, rows.Schema, folder["a/model.zip"]);
        string at = folder["a"];
        if (moved) Directory.Move(at, at = folder["b"]);
        Assert.Equal(s_documents.Select(d => typed.Generate(d)), Fresh(Path.Combine(at, "model.zip")));
    }

    [Fact]
    public void PlainSaveWritesToTheFolderOfTheOptionsAndPlainLoadFindsIt()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        using var model = ml.MiniSeq().FineTune(Tiny.Options(folder["weights"])).Fit(Tiny.Rows(ml));
        ml.Model.Save(model, null, folder["model.zip"]);
        Assert.True(File.Exists(Path.Combine(folder["weights"], "model.safetensors")));
        Assert.True(new FileInfo(folder["model.zip"]).Length < 20_000);
        Assert.Equal(s_documents.Select(d => model.Generate(d)), Fresh(folder["model.zip"]));
    }

    [Fact]
    public void FromModelSharesOneModelWithTheLoadedPipeline()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml);
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(rows);
        ml.MiniSeq().Save(model, rows.Schema, folder["model.zip"]);
        var expected = Tiny.Texts(ml, model.Transform(rows));
        var loaded = ml.MiniSeq().Load(folder["model.zip"], out _);
        Assert.Equal(expected, Tiny.Texts(ml, loaded.Transform(rows)));
        long before = Tensor.TotalCount;
        var typed = ml.MiniSeq().FromModel(loaded);
        Assert.Equal(before, Tensor.TotalCount);
        Assert.Same(typed.Model, ml.MiniSeq().FromModel(loaded).Model);
        Assert.Equal(expected, Tiny.Texts(ml, typed.Transform(rows)));
        Assert.Equal(ml.MiniSeq().Evaluate(rows, model).Loss, ml.MiniSeq().Evaluate(rows, loaded).Loss);
        typed.Dispose();
        Assert.Throws<ObjectDisposedException>(() => typed.Generate("x"));
        Assert.Equal(expected, Tiny.Texts(ml, loaded.Transform(rows))); // reads the weights again
        ml.MiniSeq().FromModel(loaded).Dispose();
        Assert.Throws<ArgumentException>(() => ml.MiniSeq().FromModel(ml.Transforms.CopyColumns("X", "Id").Fit(rows)));
    }

    [Fact]
    public void AMissingChangedOrTruncatedPartIsNamed()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        using var model = ml.MiniSeq().FineTune(Tiny.Options("weights")).Fit(Tiny.Rows(ml));
        ml.MiniSeq().Save(model, null, folder["model.zip"]);
        string weights = Path.Combine(folder["weights"], "model.safetensors");
        byte[] good = File.ReadAllBytes(weights);
        string Said() => Assert.ThrowsAny<Exception>(() => ml.MiniSeq().FromModel(ml.Model.Load(folder["model.zip"], out _))).Message;

        File.WriteAllBytes(weights, good[..^5]);
        Assert.Contains($"it has {good.Length - 5} bytes and had {good.Length}", Said());
        File.WriteAllBytes(weights, [.. good[..^1], (byte)(good[^1] ^ 1)]);
        Assert.Contains("SHA-256", Said());
        File.Delete(weights);
        Assert.Contains($"'{weights}' is missing", Said());
        Directory.Move(folder["weights"], folder["elsewhere"]);
        Assert.Contains("MINISEQ_MODEL_PATH", Said());

        File.WriteAllBytes(Path.Combine(folder["elsewhere"], "model.safetensors"), good);
        MiniSeqCatalog.ModelSearchPaths = [folder["elsewhere"]];
        try
        {
            using var found = ml.MiniSeq().FromModel(ml.Model.Load(folder["model.zip"], out _));
            Assert.Equal(model.Generate("x"), found.Generate("x"));
        }
        finally
        {
            MiniSeqCatalog.ModelSearchPaths = [];
        }
    }

    [Fact]
    public void TheFolderIsACheckpointToStartFrom()
    {
        using var folder = new TemporaryFolder();
        var ml = new MLContext(1);
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml));
        model.SavePretrained(folder.Path);
        using var more = ml.MiniSeq().FineTune(folder.Path, maxLength: 200, numTrainEpochs: 1, learningRate: 0).Fit(Tiny.Rows(ml));
        Assert.Equal(ml.MiniSeq().Evaluate(Tiny.Rows(ml), model).Loss, ml.MiniSeq().Evaluate(Tiny.Rows(ml), more).Loss, 1e-6);
    }

    internal static List<string> Fresh(string zip)
    {
        string Here(string name) => Path.Combine(AppContext.BaseDirectory, name);
        var start = new ProcessStartInfo("dotnet") { RedirectStandardOutput = true, RedirectStandardError = true, WorkingDirectory = Path.GetTempPath() };
        string[] arguments = ["exec", "--depsfile", Here("MiniSeq.MLNet.Tests.deps.json"), "--runtimeconfig", Here("MiniSeq.MLNet.Tests.runtimeconfig.json"), Here("MiniSeq.MLNet.Tests.Loader.dll"), zip, .. s_documents];
        foreach (string argument in arguments) start.ArgumentList.Add(argument);
        using var process = Process.Start(start)!;
        var errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, errors.Result);
        return [.. output.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => JsonSerializer.Deserialize<string>(line)!)];
    }
}
