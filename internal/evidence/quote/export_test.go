package quote

// FastAK is what ParseAK reads without go-tpm.
var FastAK = parseAK
