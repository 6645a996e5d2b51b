using Microsoft.ML;
using Microsoft.ML.Data;
using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.MLNet.Tests;

public sealed class FineTuneTests
{
    [Fact]
    public void WorksInAChainBeforeAndAfterOtherTransforms()
    {
        var ml = new MLContext(1);
        var options = Tiny.Options();
        options.InputColumnName = "Copy";
        var pipeline = ml.Transforms.CopyColumns("Copy", "Document").Append(ml.MiniSeq().FineTune(options)).Append(ml.Transforms.Text.FeaturizeText("Features", "GeneratedText"));
        var rows = Tiny.Rows(ml);
        var model = pipeline.Fit(rows);
        using var typed = ml.MiniSeq().FromModel(model);
        var output = model.Transform(rows);
        Assert.Equal(["Id", "Document", "Summary", "Copy", "GeneratedText", "Features"], output.Schema.Where(c => !c.IsHidden).Select(c => c.Name));
        Assert.Equal(10, output.GetColumn<VBuffer<float>>("Features").Count());
    }

    [Fact]
    public void AWrongSchemaIsToldInEachPlace()
    {
        var ml = new MLContext(1);
        foreach (var (change, said) in new (Action<FineTuneOptions>, string)[]
        {
            (o => o.InputColumnName = "Nope", "Could not find input column 'Nope'"), (o => o.LabelColumnName = "Nope", "Could not find label column 'Nope'"),
            (o => o.InputColumnName = "Id", "input column 'Id': expected String, got Single"), (o => o.LabelColumnName = "Id", "label column 'Id': expected String, got Single"),
        })
        {
            var options = Tiny.Options();
            change(options);
            var estimator = ml.MiniSeq().FineTune(options);
            Assert.Contains(said, Assert.Throws<ArgumentOutOfRangeException>(() => estimator.Fit(Tiny.Rows(ml))).Message);
            Assert.Contains(said, Assert.Throws<ArgumentOutOfRangeException>(() => ml.Transforms.CopyColumns("X", "Id").Append(estimator).Fit(Tiny.Rows(ml))).Message); // shapes
        }
    }

    [Fact]
    public void TheModelRunsInBatchesAndOnlyForTheGeneratedColumn()
    {
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml);
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(rows);
        var output = model.Transform(rows);
        Assert.Equal(10, output.GetColumn<string>("Summary").Count());
        Assert.Equal(0, model.Session.Calls);
        var texts = Tiny.Texts(ml, output);
        Assert.Equal(3, model.Session.Calls);
        Assert.Equal(rows.GetColumn<string>("Document").Select(d => model.Generate(d)), texts);

        var byDocument = rows.GetColumn<string>("Document").Zip(texts).ToDictionary(p => p.First, p => p.Second);
        foreach (var data in new[] { ml.Data.ShuffleRows(rows, 5), ml.Data.Cache(rows), ml.Data.TrainTestSplit(rows, 0.4).TestSet, ml.Data.TakeRows(rows, 3) })
        {
            var some = model.Transform(data);
            foreach (var view in new[] { some, ml.Data.ShuffleRows(some, 3), ml.Data.Cache(some) })
                foreach (var (document, text) in view.GetColumn<string>("Document").Zip(view.GetColumn<string>("GeneratedText")))
                    if (view == some) Assert.Equal(byDocument[document], text);
        }
        using var engine = ml.Model.CreatePredictionEngine<Row, Result>(model, new PredictionEngineOptions { OwnsTransformer = false });
        foreach (var (document, text) in byDocument) Assert.Equal(text, engine.Predict(new Row { Document = document }).GeneratedText);
    }

    [Fact]
    public void WithoutALabelTheTextItselfIsLearned()
    {
        var ml = new MLContext(1);
        var options = Tiny.Options();
        options.LabelColumnName = null;
        using var model = ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml));
        var tokens = Tiny.Rows(ml).GetColumn<string>("Document").Sum(d => d.Length); // and eos, less the first that nothing predicts
        Assert.Equal(tokens, ml.MiniSeq().Evaluate(Tiny.Rows(ml), model).TokenCount);
        Assert.Equal("", model.Generate(""));
    }

    [Fact]
    public void EvaluateIsTheTrainersScore()
    {
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml);
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(rows);
        var encoder = new DocumentEncoder(Tiny.Tokenizer, new FineTuneOptions().PromptTemplate, 64);
        var expected = Trainer.Evaluate(model.Model, [.. ml.Data.CreateEnumerable<Row>(rows, false).Select(r => encoder.Encode(r.Document, r.Summary))]);
        var metrics = ml.MiniSeq().Evaluate(model.Transform(rows), model);
        Assert.Equal((expected.Loss, expected.Perplexity, expected.Accuracy, expected.TargetCount), (metrics.Loss, metrics.Perplexity, metrics.TokenAccuracy, metrics.TokenCount));
        Assert.Equal(0, model.Session.Calls);
    }

    [Fact]
    public void TheContextsSeedDecides()
    {
        static byte[] Weights(int seed)
        {
            var ml = new MLContext(seed);
            using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml));
            return [.. model.Model.parameters().SelectMany(p => p.detach().bytes.ToArray())];
        }
        Assert.Equal(Weights(1), Weights(1));
        Assert.NotEqual(Weights(1), Weights(2));
    }

    [Fact]
    public void StepsAreLoggedAndReportedWithTruncatedAndSkippedRows()
    {
        var ml = new MLContext(1);
        var messages = new List<string>();
        ml.Log += (_, e) => messages.Add(e.RawMessage);
        var reports = new List<TrainingProgress>();
        var options = Tiny.Options();
        (options.Progress, options.ValidationSet) = (new Listener(reports.Add), Tiny.Rows(ml, 2));
        var rows = ml.Data.LoadFromEnumerable([new Row { Document = new string('x', 500), Summary = "s" }, new Row { Document = "d" }, new Row { Document = "d", Summary = "s" },
            new Row { Document = "d", Summary = new string('s', 500) }]);
        using var model = ml.MiniSeq().FineTune(options).Fit(rows);
        Assert.Equal(3, reports.Count);
        Assert.Contains(messages, m => m.Contains("training rows: 2 ") && m.Contains("1 documents truncated; 1 rows skipped"));
        Assert.Contains(messages, m => m.Contains("training rows skipped") && m.Contains("64 tokens of MaxLength: 1"));
        Assert.Contains(messages, m => m.Contains("step 3/3: loss") && m.Contains("learning rate") && m.Contains("tokens/s") && m.Contains("peak memory"));
        Assert.Contains(messages, m => m.Contains("validation loss") && m.Contains("perplexity"));
    }

    [Fact]
    public void FittingTwentyTimesAndCancellingLeavesNoMemory()
    {
        var ml = new MLContext(1);
        var rows = Tiny.Rows(ml, 2);
        ml.MiniSeq().FineTune(Tiny.Options()).Fit(rows).Dispose();
        // Bytes and not Tensor.TotalCount: making a Parameter raises that for good, though the wrapper it counts holds nothing.
        Assert.SkipUnless(TensorMemory.StartCounting(), "Tensors cannot be counted here.");
        long before = TensorMemory.LiveBytes;
        for (int i = 0; i < 20; i++) ml.MiniSeq().FineTune(Tiny.Options()).Fit(rows).Dispose();
        Assert.Equal(before, TensorMemory.LiveBytes);

        using var source = new CancellationTokenSource();
        var options = Tiny.Options();
        (options.CancellationToken, options.Progress) = (source.Token, new Listener(_ => source.Cancel()));
        Assert.Throws<OperationCanceledException>(() => ml.MiniSeq().FineTune(options).Fit(rows));
        Assert.Equal(before, TensorMemory.LiveBytes);
    }

    [Fact]
    public void WrongOptionsAreNamed()
    {
        var ml = new MLContext(1);
        string Said(Action<FineTuneOptions> change)
        {
            var options = Tiny.Options();
            change(options);
            return Assert.ThrowsAny<Exception>(() => ml.MiniSeq().FineTune(options).Fit(Tiny.Rows(ml))).Message;
        }
        Assert.Contains("either Model", Said(o => o.Model = "x"));
        Assert.Contains("either Model", Said(o => o.Config = null));
        Assert.Contains("Tokenizer", Said(o => o.Tokenizer = null));
        Assert.Contains("{input}", Said(o => o.PromptTemplate = "none"));
        Assert.Contains("NumTrainEpochs", Said(o => o.Training = new TrainingOptions { NumTrainEpochs = 0 }));
        Assert.Contains("VocabSize", Said(o => o.Config = o.Config! with { VocabSize = 100 }));
        Assert.Contains("special tokens 7", Said(o => o.Config = o.Config! with { EosTokenIds = [7] }));
        Assert.Contains("do not fit", Said(o => o.Generation = new GenerationOptions { MaxNewTokens = 64 }));
        Assert.Contains("/no/such/folder", Said(o => (o.Config, o.Tokenizer, o.Model) = (null, null, "/no/such/folder")));
    }

    [Fact]
    public void AGpuThatIsNotThereIsAnErrorUnlessTheCpuMayStandIn()
    {
        Assert.SkipWhen(cuda.is_available(), "This machine has a GPU.");
        var ml = new MLContext(1) { GpuDeviceId = 3, FallbackToCpu = false };
        Assert.Contains("GpuDeviceId is 3", Assert.Throws<InvalidOperationException>(() => ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml))).Message);
        ml.FallbackToCpu = true;
        using var model = ml.MiniSeq().FineTune(Tiny.Options()).Fit(Tiny.Rows(ml));
        Assert.Equal(TorchSharp.DeviceType.CPU, model.Model.Device.type);
    }

    private sealed class Listener(Action<TrainingProgress> report) : IProgress<TrainingProgress>
    {
        public void Report(TrainingProgress value) => report(value);
    }
}
