/// An ML.NET pipeline from F#: no interface covariance, so the chain starts empty.
module MiniSeq.Properties.PipelineTests

open System.IO
open Microsoft.ML
open Microsoft.ML.Data
open MiniSeq.MLNet
open MiniSeq.Models
open MiniSeq.Training
open global.Xunit

[<CLIMutable>]
type Article = { Document: string; Summary: string }

let private tokenizer =
    lazy (HuggingFaceTokenizer.FromPretrained(Path.Combine(System.AppContext.BaseDirectory, "tokenizer")))

[<Fact>]
let ``a chain of built-ins and FineTune fits and transforms`` () =
    let ml = MLContext(seed = 1)

    let rows =
        ml.Data.LoadFromEnumerable
            [
                {
                    Document = "A table has rows."
                    Summary = "Rows."
                }
                {
                    Document = "An index has keys."
                    Summary = "Keys."
                }
            ]

    let options =
        FineTuneOptions(
            Config = DecoderConfig.Llama(4096, 16, 32, 1, 2, 1, true),
            Tokenizer = tokenizer.Value,
            Training = TrainingOptions(MaxSteps = 2),
            Generation = GenerationOptions(MaxNewTokens = 4)
        )

    let model =
        EstimatorChain<ITransformer>()
            .Append(ml.Transforms.CopyColumns("Copy", "Document"))
            .Append(ml.MiniSeq().FineTune options)
            .Fit
            rows

    use transformer = ml.MiniSeq().FromModel model
    Assert.Equal(2, (model.Transform rows).GetColumn<string>("GeneratedText") |> Seq.length)
    Assert.Equal("GeneratedText", transformer.OutputColumnName)
