// Makes the page from the document. Nothing of it comes from the address of the page: queryConfigEnabled stays off.
SwaggerUIBundle({
  url: "/openapi.json",
  domNode: document.getElementById("docs"),
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
});
